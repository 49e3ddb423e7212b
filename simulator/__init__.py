"""The device-fleet simulator: data, partitions, populations, the virtual-time loop, and the report of a run."""
