"""What a network makes meshes of: pictures of one's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoo.running.checkpoint import replacing
from zoo.running.mesh_pictures import Pair, Surface, meshes_figure, to_gif, turntable, viewer_page, write_mesh
from zoo.running.picture_files import evaluation_of, from_array, printable, read_pixels, resized, short_name
from zoo.tasks.mesh import SHOWN, MeshTask, extents

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


class MeshedFiles:
    """Files with the meshes that a model makes of them.

    Args:
        model: A model of meshes in evaluation mode, on its device.
        out: Where the meshes go: ``<out>/meshes/<number>_<name>.obj`` and ``….glb``.
    """

    batch_size = 16

    def __init__(self, model: MeshTask, out: Path) -> None:
        self.model = model
        self.out = out
        self._written = 0
        self._pairs: list[Pair] = []

    def read(self, path: Path) -> Tensor:
        """One picture (3, H, W) as in training: white where it is wholly transparent, and made square by white."""
        picture = read_pixels(path, ground=255)
        height, width = picture.shape[1:]
        side = max(height, width)
        square = np.full((side, side, 3), 255, dtype=np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = picture.permute(1, 2, 0).numpy()
        size = evaluation_of(self.model).get("size", self.model.example_input_array.shape[-1])
        return resized(from_array(square), size, size).float().div_(255)

    def predict(self, paths: list[Path], images: list[Tensor]) -> list[dict[str, Any]]:
        """A row for each picture: ``file``, ``meshes`` (files in the folder), ``extents``; the files are written.

        Raises:
            ImportError: trimesh is not installed.
        """
        with torch.inference_mode():
            vertices = self.model(torch.stack(images).to(self.model.device)).cpu()
        faces = self.model.faces.cpu()
        rows = []
        for path, image, mesh in zip(paths, images, vertices, strict=True):
            stem = f"meshes/{self._written:03d}_{printable(path.stem)[:60]}"
            names = [f"{stem}.obj", f"{stem}.glb"]
            for name in names:
                write_mesh(self.out / name, mesh, faces)
            rows.append({"file": str(path), "meshes": names, "extents": extents(mesh)})
            if len(self._pairs) < SHOWN:
                self._pairs.append(Pair(image, Surface(mesh, faces, None), None, short_name(path)))
            self._written += 1
        return rows

    def sheet(self) -> "Figure":
        """The first pictures and their meshes from three sides."""
        return meshes_figure(self._pairs)

    def write_views(self) -> list[Path]:
        """Write ``predictions.gif``, where the first meshes turn, and ``predictions.html``, to turn them by hand."""
        contents = {"predictions.gif": to_gif(turntable(self._pairs)), "predictions.html": self._page()}
        for name, content in contents.items():
            with replacing(self.out / name) as partial:
                partial.write_bytes(content)
        return [self.out / name for name in contents]

    def _page(self) -> bytes:
        return viewer_page(self._pairs, "meshes of pictures").encode()

    def table(self, rows: list[dict[str, Any]]) -> "Table":
        """Each picture and the files of its mesh."""
        from rich.table import Table
        from rich.text import Text

        table = Table("picture", "mesh", "width x height x depth", box=None, header_style="bold", padding=(0, 1))
        for row in rows:
            size = " x ".join(f"{value:.2f}" for value in row["extents"])
            table.add_row(Text(printable(row["file"])), Text(", ".join(row["meshes"])), size)
        return table
