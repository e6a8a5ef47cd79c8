"""The process group that a caller means."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def group_of(mesh: DeviceMesh | dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group of a mesh of one dimension, the group itself, or that of all processes for None.

    Raises:
        TypeError, ValueError: mesh is something else.
        RuntimeError: torch.distributed is not initialised, or this process does not belong to the group.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call init_process_group or init_device_mesh first")
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names or (f"{mesh.ndim} without names",)
            raise ValueError(
                f"mesh must have one dimension, got {mesh.ndim} ({', '.join(names)}): mesh[name] selects one"
            )
        return mesh.get_group()
    group = dist.group.WORLD if mesh is None else mesh
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError("this process does not belong to the group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh, a ProcessGroup or None, got {type(mesh).__name__}")
    return group
