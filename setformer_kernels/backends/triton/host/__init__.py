"""What the host knows of every launch: tiles, the device, strides."""
