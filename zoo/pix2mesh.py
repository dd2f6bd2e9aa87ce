"""Pixel2Mesh: from one image to a triangle mesh, by three deformations of an ellipsoid.

Paper: Wang, Zhang, Li, Fu, Liu and Jiang, 2018, Pixel2Mesh: generating 3D mesh models from single RGB images,
https://arxiv.org/abs/1804.01654 (sections 3.1 to 3.4).
Lecture: EECS 498-007, lecture 17, "3D vision".
Differs from the paper in its ellipsoid, which has the published extent and counts, but triangles of our own; weights
that others trained belong to theirs. Differs from the published code in three points. Its graph convolution takes the
scaled Laplacian in place of the sum over the neighbours, which the paper and the lecture write. Its bilinear sampling
gives zeros at whole pixels. And initial weights are scaled here so that features keep their size: by He's rule before
rectifiers, and those of a sum over neighbours by its number of terms.

The camera looks along -z, y is up: a vertex (x, y, z) is seen at column ``f x / -z + c`` and row ``f -y / -z + c``,
counted in pixels from the middle of the first. Lengths are those of ShapeNet's models times 0.57.
"""

import itertools
import math
from contextlib import nullcontext
from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD, Standardize
from zoo.tasks.mesh import Meshes, MeshTask
from zoo.tasks.mesh_losses import Pix2MeshLoss
from zoo.weights import load_trunk, load_weights

RINGS = (5, 10, 15, 18, 19, 20, 19, 18, 15, 10, 5)  # vertices of the first mesh from pole to pole, without the poles
CENTRE = (0.0, 0.0, -0.8)  # of the ellipsoid in the camera's frame
HALF_AXES = (0.276, 0.194, 0.2)
FOCAL_LENGTH = 250 / 224  # in heights of the image
RENDERED = 248 / 224  # the same of the camera of 3D-R2N2's renderings, as the paper has it
NEAREST = 0.01  # depth at which vertices are seen that are nearer than it, or behind the camera
MEAN_DEGREE = 6  # neighbours of a vertex


def sphere() -> tuple[Tensor, Tensor]:
    """A unit sphere of triangles of about one size, all seen counter-clockwise from outside.

    Circles of latitude at equal distances, each with as many vertices as its length asks for, and the two poles.

    Returns:
        Vertices (156, 3), the first at y = 1 and the last at y = -1, and faces (308, 3).
    """
    rings = [[0]]
    vertices = [(0.0, 1.0, 0.0)]
    for k, count in enumerate(RINGS, 1):
        height, radius = math.cos(k * math.pi / (len(RINGS) + 1)), math.sin(k * math.pi / (len(RINGS) + 1))
        rings.append(list(range(len(vertices), len(vertices) + count)))
        angles = [2 * math.pi * i / count for i in range(count)]
        vertices += [(radius * math.cos(angle), height, -radius * math.sin(angle)) for angle in angles]
    rings.append([len(vertices)])
    vertices.append((0.0, -1.0, 0.0))
    faces = [face for upper, lower in itertools.pairwise(rings) for face in _band(upper, lower)]
    return torch.tensor(vertices), torch.tensor(faces)


def _band(upper: list[int], lower: list[int]) -> list[tuple[int, int, int]]:
    """Triangles between two circles, or a circle and a pole: each edge of either and a vertex of the other."""
    n, m = (len(ring) if len(ring) > 1 else 0 for ring in (upper, lower))
    faces, i, j = [], 0, 0
    while i < n or j < m:
        here, below = upper[i % len(upper)], lower[j % len(lower)]
        if j == m or (i < n and (2 * i + 1) * m < (2 * j + 1) * n):  # the edge whose middle comes first
            i += 1
            faces.append((here, below, upper[i % n]))
        else:
            j += 1
            faces.append((here, below, lower[j % m]))
    return faces


def edges_of(faces: Tensor) -> Tensor:
    """Every edge of faces (F, 3) once: (E, 2), the lower vertex first, in order."""
    corners = torch.stack([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]], dim=1)
    return corners.flatten(0, 1).sort(dim=1).values.unique(dim=0)


def subdivided(faces: Tensor, edges: Tensor, vertices: int) -> Tensor:
    """Each of faces (F, 3) parted in four: (4 F, 3), where the middle of edge e is vertex ``vertices + e``."""
    place = torch.full((vertices, vertices), -1)
    place[edges[:, 0], edges[:, 1]] = place[edges[:, 1], edges[:, 0]] = torch.arange(len(edges)) + vertices
    a, b, c = faces.T
    ab, bc, ca = place[a, b], place[b, c], place[c, a]
    corners = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    return torch.stack([torch.stack(corner, dim=1) for corner in corners], dim=1).flatten(0, 1)


class Graph(nn.Module):
    """Which vertices of a mesh are neighbours; no weights, and nothing that a checkpoint must carry.

    Features on it are (V, N, C), vertices first: what a vertex gathers is then one row of N C numbers, which is several
    times as fast as to gather with the meshes first.

    Args:
        faces: int64 (F, 3), triangles of a closed mesh of V vertices.

    Attributes:
        faces: As given.
        edges: int64 (E, 2), each once, the lower vertex first.
        neighbours: int64 (2 E,), those of the first vertex, those of the second, ….
        starts: int64 (V,), where each vertex's begin.
    """

    faces: Tensor
    edges: Tensor
    neighbours: Tensor
    starts: Tensor

    def __init__(self, faces: Tensor) -> None:
        super().__init__()
        edges = edges_of(faces)
        both = torch.cat([edges, edges.flip(1)]).unique(dim=0)  # in the order of the first column
        degrees = both[:, 0].bincount()
        self.register_buffer("faces", faces, persistent=False)
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("neighbours", both[:, 1].contiguous(), persistent=False)
        self.register_buffer("starts", degrees.cumsum(0) - degrees, persistent=False)

    def sum_neighbours(self, x: Tensor) -> Tensor:
        """For each vertex the sum of its neighbours' features: (V, N, C) to (V, N, C)."""
        # The fastest of torch's ways on a CPU, both directions together: see benchmarks/mesh.py.
        return F.embedding_bag(self.neighbours, x.flatten(1), self.starts, mode="sum").view(x.shape)

    def unpool(self, x: Tensor) -> Tensor:
        """Add a vertex in the middle of each edge, with the mean of both ends' features: (V, N, C) to (V + E, N, C)."""
        return torch.cat([x, (x[self.edges[:, 0]] + x[self.edges[:, 1]]) / 2])

    def unpooled(self) -> "Graph":
        """The graph after :meth:`unpool`, every face parted in four."""
        return Graph(subdivided(self.faces, self.edges, len(self.starts)))


class GraphConv(nn.Module):
    """The paper's graph convolution (equation 1): ``f'_i = W0 f_i + sum over neighbours j of W1 f_j + b``.

    Initial weights are Glorot's, W1 divided by the number of neighbours.

    Args:
        in_features: Length of a vertex's features.
        out_features: Length of those it becomes.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.own = nn.Linear(in_features, out_features)
        self.neighbours = nn.Linear(in_features, out_features, bias=False)
        nn.init.xavier_uniform_(self.own.weight)
        nn.init.xavier_uniform_(self.neighbours.weight, gain=1 / MEAN_DEGREE)
        nn.init.zeros_(self.own.bias)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        """Map features (V, N, in_features) to (V, N, out_features)."""
        return cast(Tensor, self.own(x) + graph.sum_neighbours(self.neighbours(x)))


class GraphResidual(nn.Module):
    """Two graph convolutions beside a shortcut, and the mean of both: (V, N, C) to (V, N, C)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = GraphConv(features, features)
        self.conv2 = GraphConv(features, features)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        """Map features (V, N, C) to (V, N, C)."""
        return (x + F.relu(self.conv2(F.relu(self.conv1(x, graph)), graph))) / 2


class DeformationBlock(nn.Module):
    """The paper's G-ResNet: from features of vertices to their places.

    Args:
        in_features: Length F of a vertex's features.
        hidden: Length H of those within.
        residuals: Number of residual blocks, of two convolutions each.
        last: Length of the features of one more convolution before the places; None has none.
    """

    def __init__(self, in_features: int, hidden: int, residuals: int, last: int | None = None) -> None:
        super().__init__()
        self.first = GraphConv(in_features, hidden)
        self.residuals = nn.ModuleList(GraphResidual(hidden) for _ in range(residuals))
        self.last = None if last is None else GraphConv(hidden, last)
        self.places = GraphConv(last or hidden, 3)

    def forward(self, x: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """Map features (V, N, F) to places (V, N, 3) and features (V, N, H)."""
        hidden = F.relu(self.first(x, graph))
        for residual in self.residuals:
            hidden = residual(hidden, graph)
        x = hidden if self.last is None else F.relu(self.last(hidden, graph))
        # In bfloat16 a place would be off by more than the distance at which it counts as right.
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return self.places(x.to(self.places.own.weight.dtype), graph), hidden


def _convolutions(in_channels: int, channels: int, kernel_size: int, stride: int, count: int) -> nn.Sequential:
    """A convolution with a stride and ``count - 1`` 3x3 ones, each rectified."""
    layers: list[nn.Module] = []
    for i in range(count):
        size = 3 if i else kernel_size
        layers.append(nn.Conv2d(channels if i else in_channels, channels, size, 1 if i else stride, padding=size // 2))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class VGGEncoder(nn.Module):
    """The paper's encoder: 18 convolutions, which halve the image with strides and not with pools.

    Args:
        width: Channels of the first block, 16 in the paper; the following have 2, 4, 8, 16 and 32 times as many.

    Attributes:
        strides: Pixels of the image for each place of the maps that it gives.
        features: Number of all their channels.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = (4 + 8 + 16 + 32) * width
        self.stem = nn.Sequential(_convolutions(3, width, 3, 1, 2), _convolutions(width, 2 * width, 3, 2, 3))
        self.stages = nn.ModuleList(
            [
                _convolutions(2 * width, 4 * width, 3, 2, 3),
                _convolutions(4 * width, 8 * width, 3, 2, 3),
                _convolutions(8 * width, 16 * width, 5, 2, 3),
                _convolutions(16 * width, 32 * width, 5, 2, 4),
            ]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) in [0, 1] to four maps (N, C, H / stride, W / stride)."""
        x = self.stem(images)  # (N, 2 width, H / 2, W / 2)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class ResNetEncoder(nn.Module):
    """torchvision's ResNet-50 without its classifier, behind ImageNet's standardisation.

    Attributes:
        strides: Pixels of the image for each place of the maps that it gives.
        features: Number of all their channels.
    """

    strides = (4, 8, 16, 32)
    features = 256 + 512 + 1024 + 2048

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet50

        self.standardize = Standardize(IMAGENET_MEAN, IMAGENET_STD)
        self.network = resnet50(weights=None)
        self.network.fc = nn.Identity()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) in [0, 1] to four maps (N, C, H / stride, W / stride)."""
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(self.standardize(images)))))  # (N, 64, H / 4, W / 4)
        maps = []
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            maps.append(x)
        return maps


def published_intrinsics(height: int, width: int) -> Tensor:
    """The published camera for images of that size: (3, 3), for 224 x 224 focal length 250 and centre (112, 112)."""
    focal = FOCAL_LENGTH * height
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def project(vertices: Tensor, intrinsics: Tensor) -> Tensor:
    """Where the camera sees vertices.

    Args:
        vertices: float (N, V, 3) in the camera's frame: x to the right, y up, z towards the viewer.
        intrinsics: float (N, 3, 3) or (3, 3), which map (x / depth, -y / depth, 1) to (column, row, 1).

    Returns:
        (N, V, 2), column and row in pixels from the middle of the first one; outside the image as well.
    """
    x, y, z = vertices.unbind(-1)
    depth = (-z).clamp(min=NEAREST)
    rays = torch.stack([x / depth, -y / depth, torch.ones_like(depth)], dim=-1)
    return (rays @ intrinsics.to(rays).transpose(-1, -2))[..., :2]


def pool_features(maps: list[Tensor], strides: tuple[int, ...], places: Tensor) -> Tensor:
    """Perceptual feature pooling (section 3.2): what the maps hold at places of the image.

    Between its places a map is interpolated bilinearly; beyond its edge it goes on as at the edge.

    Args:
        maps: float (N, C_k, H_k, W_k), whose place i is at pixel ``strides[k] * i``: that is where convolutions padded
            on both sides have it.
        strides: Pixels between a map's places.
        places: float (N, V, 2), column and row in pixels.

    Returns:
        float (V, N, sum of C_k), of the places' dtype.
    """
    pooled = []
    for each, stride in zip(maps, strides, strict=True):
        size = torch.tensor(each.shape[:1:-1], dtype=places.dtype, device=places.device)  # (W_k, H_k)
        grid = (2 * places / stride + 1) / size - 1  # from -1 to 1 between the map's edges
        sampled = F.grid_sample(each.to(places.dtype), grid[:, :, None], padding_mode="border", align_corners=False)
        pooled.append(sampled[..., 0])
    return torch.cat(pooled, dim=1).permute(2, 0, 1)


class Pix2MeshNetwork(nn.Module):
    """Pixel2Mesh without its losses.

    Args:
        encoder: ``vgg``, the paper's, of 18 convolutions; ``resnet50``, torchvision's.
        width: Channels of the VGG's first block; 16 in the paper. A ResNet leaves it aside.
        hidden: Length of the vertices' features: 192 in the paper, 256 in the published weights.
        residuals: Residual blocks of each deformation; 6 in the paper.
        offsets: Take what a deformation gives as offsets from the vertices before it, which are zero at first. The
            paper's gives the places themselves, here counted from the ellipsoid's centre.

    Attributes:
        graphs: The meshes' triangles, edges and neighbours at the three stages.
        ellipsoid: float (156, 3), where the first deformation starts.

    Raises:
        ValueError: ``encoder`` is neither of the two.
    """

    ellipsoid: Tensor
    centre: Tensor

    def __init__(
        self,
        encoder: Literal["vgg", "resnet50"] = "vgg",
        width: int = 16,
        hidden: int = 256,
        residuals: int = 6,
        offsets: bool = False,
    ) -> None:
        super().__init__()
        if encoder not in ("vgg", "resnet50"):
            raise ValueError(f"encoder={encoder!r} is neither vgg nor resnet50")
        self.offsets = offsets
        self.encoder = VGGEncoder(width) if encoder == "vgg" else ResNetEncoder()
        with torch.device("cpu"):  # a network on the meta device has no values to sort and count
            vertices, faces = sphere()
            first = Graph(faces)
            second = first.unpooled()
            graphs = nn.ModuleList([first, second, second.unpooled()])
            centre = torch.tensor(CENTRE)
            ellipsoid = vertices * torch.tensor(HALF_AXES) + centre
        self.graphs = graphs.to(torch.get_default_device())
        self.register_buffer("centre", centre.to(torch.get_default_device()), persistent=False)
        self.register_buffer("ellipsoid", ellipsoid.to(torch.get_default_device()), persistent=False)
        features = self.encoder.features + 3
        blocks = [
            DeformationBlock(features, hidden, residuals),
            DeformationBlock(features + hidden, hidden, residuals),
            DeformationBlock(features + hidden, hidden, residuals, last=hidden // 2),
        ]
        if offsets:
            for block in blocks:
                nn.init.zeros_(block.places.own.weight)
                nn.init.zeros_(block.places.neighbours.weight)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor, intrinsics: Tensor | None = None) -> Meshes:
        """Map images (N, 3, H, W) in [0, 1], on white, to meshes.

        Args:
            images: float, of any size from 32 pixels on; the paper's are 224 x 224.
            intrinsics: float (N, 3, 3) or (3, 3), of cameras as in :func:`project`; None takes the published one.

        Returns:
            The vertices at each of the three stages: (N, 156, 3), (N, 618, 3) and (N, 2466, 3), in the camera's frame.
        """
        if intrinsics is None:
            intrinsics = published_intrinsics(*images.shape[-2:])
        maps = self.encoder(images)
        vertices = self.ellipsoid[:, None].expand(-1, images.shape[0], -1)  # (V, N, 3), as all features of vertices
        intrinsics = intrinsics.to(vertices)
        hidden, stages = None, Meshes([], [])
        for k, block in enumerate(self.blocks):
            features = self._features(maps, vertices, intrinsics, hidden)
            if k:
                coarse = cast(Graph, self.graphs[k - 1])
                vertices, features = coarse.unpool(vertices), coarse.unpool(features)
            stages.before.append(vertices.transpose(0, 1))
            places, hidden = block(features, self.graphs[k])
            vertices = places + (vertices if self.offsets else self.centre)
            stages.after.append(vertices.transpose(0, 1))
        return stages

    def _features(self, maps: list[Tensor], vertices: Tensor, intrinsics: Tensor, hidden: Tensor | None) -> Tensor:
        """What a deformation starts from: of each vertex (V, N, 3) the maps' features, its place, and ``hidden``."""
        pooled = pool_features(maps, self.encoder.strides, project(vertices.transpose(0, 1), intrinsics))
        return torch.cat([pooled, vertices, *([] if hidden is None else [hidden.to(pooled.dtype)])], dim=2)


class Pix2Mesh(MeshTask):
    """Makes a triangle mesh of 2466 vertices from an image of an object.

    Weights depend on the triangles that :func:`sphere` makes: those of the published models do not fit.

    Args:
        class_names: Names of the categories, by which the scores are told; from a data module. No weight depends on
            them. None takes all views for one category.
        encoder: ``vgg``, the paper's, of 18 convolutions; ``resnet50``, torchvision's.
        width: Channels of the VGG's first block; 16 in the paper. A ResNet leaves it aside.
        hidden: Length of the vertices' features: 192 in the paper, 256 in the published weights.
        residuals: Residual blocks of each deformation; 6 in the paper.
        offsets: Take what a deformation gives as offsets from the vertices before it, which are zero at first. The
            paper's gives the places themselves.
        image_size: Side of the images that the model is made for, in pixels; any from 32 on will run.
        focal_length: Of the camera of images that come without one, in heights of the image.
        opposite: Weight of the mean squared distance of the vertices to the true points; that of the points to the
            vertices weighs 1.
        normal: Weight of the edges' angle to the surface's normals.
        laplacian: Weight of the change of the vertices' differences from their neighbours; 0.3 in the paper, 0.5 in its
            code.
        edge: Weight of the edges' squared length.
        move: Weight of the vertices' squared way, but in the first deformation.
        weights: A file of a Pix2Mesh of the same measures (``.safetensors``, ``.ckpt``) or ``hf://owner/name``.
        backbone_weights: For the ResNet alone: torchvision's name (``DEFAULT``, ``IMAGENET1K_V2``) or a file of a
            classifier.
        optimizer: Makes the optimizer from the parameters. Default: the paper's, for one image a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: a third of the rate
            after four fifths of the run, as in the paper, there after 40 of 50 epochs.

    Raises:
        ValueError: ``encoder`` is neither of the two, or ``backbone_weights`` are for another one.
    """

    @plain_arguments
    def __init__(
        self,
        class_names: list[str] | None = None,
        encoder: Literal["vgg", "resnet50"] = "vgg",
        width: int = 16,
        hidden: int = 192,
        residuals: int = 6,
        offsets: bool = False,
        image_size: int = 224,
        focal_length: float = RENDERED,
        opposite: float = 0.55,
        normal: float = 1.6e-4,
        laplacian: float = 0.5,
        edge: float = 0.1,
        move: float = 1 / 30,
        weights: str | None = None,
        backbone_weights: str | None = None,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=3e-5, weight_decay=1e-5),
        scheduler: SchedulerCallable | None = lambda optimizer, steps: Step(optimizer, steps, [0.8], gamma=1 / 3),
    ) -> None:
        super().__init__(class_names, optimizer, scheduler)
        self.example_input_array = torch.zeros(1, 3, image_size, image_size)
        self.focal_length = focal_length
        self.network = Pix2MeshNetwork(encoder, width, hidden, residuals, offsets)
        self.loss = Pix2MeshLoss(opposite, normal, laplacian, edge=edge, move=move)
        if backbone_weights is not None:
            if not isinstance(self.backbone, ResNetEncoder):
                raise ValueError(f"backbone_weights={backbone_weights!r} are for encoder resnet50, this is {encoder}")
            load_trunk(self.backbone.network, backbone_weights, "resnet50")
        if weights is not None:
            load_weights(self, weights)

    @property
    def backbone(self) -> nn.Module:
        """The image encoder, which is a part of ``network``."""
        return self.network.encoder

    @property
    def edges(self) -> list[Tensor]:
        """The edges int64 (E_k, 2) of the meshes of each stage."""
        return [cast(Graph, graph).edges for graph in self.network.graphs]

    @property
    def faces(self) -> Tensor:
        """The triangles int64 (4928, 3) of the last stage's meshes, counter-clockwise from outside."""
        return cast(Graph, self.network.graphs[-1]).faces

    def meshes(self, images: Tensor, intrinsics: Tensor) -> Meshes:
        """The vertices of each stage of images (N, 3, H, W) and cameras (N, 3, 3) or (3, 3)."""
        return cast(Meshes, self.network(images, intrinsics))

    def camera(self, height: int, width: int) -> Tensor:
        """The camera (3, 3) of images of that size that come without one, which looks at their middle."""
        focal = self.focal_length * height
        middle = ((width - 1) / 2, (height - 1) / 2)
        return torch.tensor([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1]], device=self.device)
