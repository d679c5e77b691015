"""Options that say over which devices and processes a command is spread."""

from types import SimpleNamespace
from typing import get_args

from jax.sharding import Mesh

from qjax.calibrate.pod import Weights
from qjax.cli_options import Option, one_of, switch, text, whole
from qjax.cli_output import Output
from qjax.models.mesh import check_mesh, data_mesh, processes_of, start, writes

MESH_DATA = Option(
    name="mesh.data", read=whole(1), metavar="N", help="devices that share the items"
)
MESH_BLOCK = Option(
    name="mesh.block",
    read=whole(1),
    metavar="N",
    help="devices that share alike blocks, fitted at once",
)
MESH_WEIGHTS = Option(
    name="mesh.weights",
    read=one_of(get_args(Weights)),
    metavar="WORD",
    help="whole: every device has the networks; sharded: a part of them, for large ones",
)
PICTURES = Option(
    name="mesh.data", read=whole(1), metavar="N", help="devices that share the pictures"
)
PROCESSES = (
    Option(
        name="mesh.coordinator",
        read=text,
        metavar="HOST:PORT",
        help="the first process of several; TPU pods find it out with --distributed",
    ),
    Option(name="mesh.processes", read=whole(1), metavar="N", help="how many"),
    Option(name="mesh.process", read=whole(0), metavar="I", help="which one, from 0"),
    Option(
        name="distributed",
        read=switch,
        help="join the other processes of a TPU pod, which are started alike",
    ),
)
SPREAD = (PICTURES, *PROCESSES)
"""Of commands that draw."""


def joined(settings: SimpleNamespace) -> bool:
    """Whether the command line says anything of a mesh; other processes are joined by then.

    Raises:
      ValueError: If it names some other processes by half.
    """
    said = {name: value for name, value in vars(settings).items() if name.startswith("mesh.")}
    if all(value is None for value in said.values()) and not settings.distributed:
        return False
    names = ("coordinator", "processes", "process")
    coordinator, processes, process = (said[f"mesh.{name}"] for name in names)
    if settings.distributed or any(said[f"mesh.{name}"] is not None for name in names):
        start(coordinator=coordinator, processes=processes, process=process)
    return True


def chosen_mesh(settings: SimpleNamespace, output: Output) -> Mesh | None:
    """The mesh that pictures are spread over; None if none is asked for.

    Of several processes only the first goes on to speak.

    Raises:
      ValueError: If the mesh does not suit the devices.
    """
    if not joined(settings):
        return None
    mesh = data_mesh(getattr(settings, PICTURES.field))
    check_mesh(mesh)
    if not writes(mesh):
        output.silence()
    processes = processes_of(mesh)
    words = f" of {processes} processes" if processes > 1 else ""
    output.say(f"pictures are spread over {mesh.size} devices{words}")
    return mesh
