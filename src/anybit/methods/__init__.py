"""One file per quantization method: its configuration, its layouts and its quantizer. The folder is the list of methods."""
