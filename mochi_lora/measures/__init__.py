"""From clips to numbers: formulas over frames and embeddings, and the networks that embed."""
