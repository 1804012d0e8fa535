"""Resources that threads and processes share: devices, GPU memory, CUDA streams, and queues for cores and GPUs."""
