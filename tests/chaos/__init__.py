"""The fault suite: operations under kill -9, pauses and rebalances, and a judge that reads topics. docs/chaos.md."""
