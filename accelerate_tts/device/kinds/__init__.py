"""Device types. Each file registers a `DeviceSpec`; CONTRIBUTING.md has an example."""
