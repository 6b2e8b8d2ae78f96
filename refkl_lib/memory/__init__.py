"""What it costs: the bytes that live now, what the system says, and the bill of a run to come."""
