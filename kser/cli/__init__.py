"""The kser command."""
