"""Developer tools behind dev.py: set-up, a ComfyUI server to drive, synthetic models, the demo."""
