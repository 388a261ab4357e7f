"""Raw footage to clips worth training on: splitting, filtering, captioning."""
