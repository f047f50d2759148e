"""What engines are worth: images, quality, speed, memory, realised precision."""
