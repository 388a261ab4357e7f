"""How the transformer is run: precision, attention, memory, and the plan that settles them."""
