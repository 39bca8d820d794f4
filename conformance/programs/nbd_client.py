"""nbd-client, as far as it goes without the kernel's module: listing.

Attaching is the kernel part's subject (``--part kernel``).
"""

from conformance.context import Context
from conformance.registry import check, expect

__all__ = ["listed_names"]

NEEDS = ("nbd-client",)


def listed_names(text: str) -> list[str]:
    """The export names in what nbd-client -l printed: "NAME" or "NAME: DESCRIPTION" lines."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("Negotiation")]
    return [line.split(": ")[0] for line in lines if line]


@check("nbd-client", "list", needs=NEEDS)
def list_exports(context: Context) -> None:
    """-l over TCP prints the names, one per line."""
    images = {"first": context.image("a"), "second disk": context.image("b")}
    server = context.serve(exports=images, listen=("tcp",))
    text = context.run("nbd-client", "-l", server.host, str(server.port)).stdout
    expect(sorted(images), sorted(listed_names(text)), "names")


@check("nbd-client", "list by socket", needs=NEEDS)
def list_by_socket(context: Context) -> None:
    """-l over a Unix socket."""
    server = context.serve(exports={"first": context.image("a")})
    text = context.run("nbd-client", "-l", "-unix", str(server.socket)).stdout
    expect(["first"], listed_names(text), "names")
