"""The drawn world mochi-tiny was trained on: scenes with captions, their pictures, and a judge that measures clips."""
