"""The drafter: configuration, slots, attention, the network, and drafting."""
