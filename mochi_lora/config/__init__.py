"""Settings: schema, loading, reference, requests. Imports no torch."""
