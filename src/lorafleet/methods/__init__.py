"""What can be trained beside LoRA adapters, each with the slots that the one training loop asks for."""
