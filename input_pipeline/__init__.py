"""From files to uint8 batches on the host; knows nothing of models and needs no accelerator."""
