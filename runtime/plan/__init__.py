"""Planning: what a layout asks of each rank in bytes, messages and time, without a device and before anything runs."""
