"""The verifier: its configuration, the parts that training reads, and its quantisation."""
