"""Load a base model: hub id, local folder, GGUF file or the demo base; its device, precision and hashes."""
