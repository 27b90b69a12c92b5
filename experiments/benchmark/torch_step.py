"""Contestant: the same training step in carefully written plain PyTorch.

Fused attention (scaled_dot_product_attention), bfloat16 by autocast, foreach operations for clipping and
EMA, PyTorch's fused AdamW; one backbone pass per crop size, as in the official DINO code. Imports
nothing from the package. Parameter names are those of the official code.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.benchmark.worker import forget_peak, random_crops, resident_peak, serve


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp, self.drop_path = Attention(dim, num_heads), Mlp(dim), drop_path

    def _dropped(self, branch):
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (keep.to(branch.dtype) / (1.0 - self.drop_path))

    def forward(self, x):
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class Backbone(nn.Module):
    def __init__(self, s):
        super().__init__()
        dim, depth = s["embed_dim"], s["depth"]
        self.grid = s["global_size"] // s["patch_size"]
        self.patch_embed = PatchEmbed(dim, s["patch_size"])
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid**2, dim))
        rates = np.linspace(0.0, s["drop_path"], depth)
        self.blocks = nn.ModuleList(Block(dim, s["num_heads"], float(rate)) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _positions(self, side):
        if side == self.grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        scale = (side + 0.1) / self.grid
        patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
        patches = patches.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def forward(self, images):
        """Class tokens [B, D] of images [B, 3, H, W]."""
        x = self.patch_embed(images)
        side = math.isqrt(x.shape[1])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class DINOHead(nn.Module):
    def __init__(self, dim, prototypes, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        self.last_layer = nn.Module()
        self.last_layer.weight_v = nn.Parameter(nn.Linear(bottleneck, prototypes).weight.detach())
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        return F.linear(x, F.normalize(self.last_layer.weight_v, dim=-1))


def projector(dim, width):
    """Barlow Twins' three layers."""
    return nn.Sequential(
        nn.Linear(dim, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width, bias=False),
    )  # fmt: skip


def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """DINO loss of student [V, B, K] and teacher [2, B, K], with the official loop over pairs of views."""
    student = F.log_softmax(student.float() / student_temp, dim=-1)
    teacher = F.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    terms = [
        torch.sum(-teacher[t] * student[v], dim=-1).mean()
        for t in range(2)
        for v in range(len(student))
        if v != t
    ]
    return sum(terms) / len(terms)


def barlow_twins_loss(z_a, z_b, lambd=0.0051):
    """Barlow Twins loss of z_a, z_b [B, D]."""
    z_a, z_b = (F.batch_norm(z.float(), None, None, training=True) for z in (z_a, z_b))
    c = z_a.T @ z_b / len(z_a)
    diagonal = torch.diagonal(c)
    off_diagonal = c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:]
    return (diagonal - 1).square().sum() + lambd * off_diagonal.square().sum()


class Trainer:
    """Student, teacher, center, optimiser, and one step of them on fixed crops."""

    def __init__(self, settings: dict, device: str):
        s = self.settings = settings
        self.device, self.method = device, s["method"]
        self.student, self.teacher = nn.ModuleDict(), nn.ModuleDict()
        self.student["backbone"], self.teacher["backbone"] = Backbone(s), Backbone(s)
        if self.method != "barlow_twins":
            for network in (self.student, self.teacher):
                network["dino"] = DINOHead(s["embed_dim"], s["prototypes"])
        if self.method != "dino":
            self.student["barlow_twins"] = projector(s["embed_dim"], s["projector"])
        self.student.to(device).train()
        self.teacher.to(device).train()  # the official teacher has no drop path: set below
        for block in self.teacher["backbone"].blocks:
            block.drop_path = 0.0
        self.teacher.requires_grad_(False)
        self.sync_teacher()
        self.center = torch.zeros(s["prototypes"], device=device)
        decayed, others = [], []
        for name, p in self.student.named_parameters():
            (others if name.endswith("bias") or p.ndim == 1 else decayed).append(p)
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=1e-6, weight_decay=0.04, fused=True,
        )  # fmt: skip
        self.averaged = [
            (self.student.get_parameter(name), p) for name, p in self.teacher.named_parameters()
        ]
        self.parameters = list(self.student.parameters())
        self.objective = self.loss

    def sync_teacher(self) -> None:
        """Copies the student to the teacher."""
        for name, p in self.teacher.named_parameters():
            p.data.copy_(self.student.get_parameter(name).data)

    def loss(self, global_crops, local_crops, center):
        """(loss, mean of the teacher's logits or None); crops [V, B, 3, H, W]."""
        B = global_crops.shape[1]
        enabled = self.settings["dtype"] == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16, enabled=enabled):
            cls = self.student["backbone"](global_crops.flatten(0, 1))
            total, mean, views = 0.0, None, cls
            if len(local_crops):
                views = torch.cat([cls, self.student["backbone"](local_crops.flatten(0, 1))])
            if self.method != "barlow_twins":
                with torch.no_grad():
                    features = self.teacher["backbone"](global_crops.flatten(0, 1))
                    teacher = self.teacher["dino"](features)
                student = self.student["dino"](views)
                K = student.shape[-1]
                pair = student.view(-1, B, K), teacher.view(2, B, K)
                total = dino_loss(*pair, center, 0.1, 0.04)
                mean = teacher.float().mean(dim=0)
            if self.method != "dino":
                z_a, z_b = (self.student["barlow_twins"](z) for z in cls.split(B))
                with torch.autocast(self.device, enabled=False):
                    weight = 1.0 if self.method == "barlow_twins" else 0.024
                    total = total + weight * barlow_twins_loss(z_a, z_b)
        return total, mean

    def step(self, crops: dict[str, torch.Tensor]) -> None:
        """Runs one training step."""
        loss, mean = self.objective(crops["global_crops"], crops["local_crops"], self.center)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            grads = [p.grad for p in self.parameters]
            scales = [(3.0 / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(grads)]
            torch._foreach_mul_(grads, scales)
        self.optimizer.step()
        with torch.no_grad():
            new, old = ([pair[i] for pair in self.averaged] for i in (0, 1))
            torch._foreach_lerp_(old, new, 1.0 - 0.996)
            if mean is not None:
                self.center.mul_(0.9).add_(mean, alpha=0.1)


def to_views(crops: np.ndarray, device: str) -> torch.Tensor:
    """[B, V, H, W, 3] -> [V, B, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(crops.transpose(1, 0, 4, 2, 3))).to(device)


def prepare(settings: dict) -> tuple[dict, dict]:
    """Builds the trainer and runs it once (compiled if settings["compile"]); see worker.serve."""
    compiled = settings.pop("compile")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in JAX; no effect on a CPU
    torch.manual_seed(0)
    trainer = Trainer(settings, device)
    if compiled:
        trainer.objective = torch.compile(trainer.loss)
    crops = {name: to_views(x, device) for name, x in random_crops(settings).items()}

    def steps(count: int) -> dict:
        start = time.perf_counter()
        for _ in range(count):
            trainer.step(crops)
        if device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start}

    def peak_bytes() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()

    first = steps(1)["seconds"]  # compiles, and makes the optimiser's state
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    forget_peak()
    second = steps(1)["seconds"]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    facts = {"compile_s": first - second} if compiled else {}
    facts["first_step_s"] = second
    facts |= {"device": name, "devices": 1, "version": f"torch {torch.__version__}"}
    return facts, {"steps": steps, "peak": lambda: {"peak_bytes": peak_bytes()}}


if __name__ == "__main__":
    serve(prepare)
