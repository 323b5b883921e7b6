"""What is known of each type of device: a file each, which registers a `DeviceSpec`. CONTRIBUTING.md has an example."""
