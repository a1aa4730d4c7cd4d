"""HTTP driver: a producer that posts messages to the REST API, and the endpoint that takes them elsewhere."""
