"""What a switch between the two lives of a GPU has moved."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Of the GPU that a process works on, all processes on it counted; in bytes."""

    free: int  # after the switch
    freed: int  # by how much the switch has made `free` grow; negative if it took memory
