"""In-memory driver: producer to consumer without a broker."""
