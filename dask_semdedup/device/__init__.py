"""Where work runs and what it may take: devices, memory, streams, and queues for cores and GPUs."""
