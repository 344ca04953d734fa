"""Muon for the matrices inside a model's layers, AdamW for all else, as one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) makes each update orthogonal, which is meant for matrices that map one
hidden state to another: its author leaves embeddings, the head, biases and norms to AdamW.
"""

from collections.abc import Callable, Sequence

import torch

_IS_MUON = "use_muon"


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon on the groups that say `use_muon`, torch's AdamW on the others; one state and one list of groups.

    Updates of Muon have the size of AdamW's (Moonlight's rule, arXiv 2502.16982), so that one learning rate and one
    weight decay serve both. A matrix has one moment instead of two.
    """

    def __init__(
        self, groups: Sequence[dict[str, object]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        own = [dict(group, **({} if group.get(_IS_MUON) else {"betas": betas, "eps": eps})) for group in groups]
        self._muon: torch.optim.Optimizer | None = None
        self._adamw: torch.optim.Optimizer | None = None
        if of_muon := [group for group in own if group.get(_IS_MUON)]:
            self._muon = torch.optim.Muon(of_muon, lr=lr, adjust_lr_fn="match_rms_adamw")
        if others := [group for group in own if not group.get(_IS_MUON)]:
            self._adamw = torch.optim.AdamW(others, lr=lr)
        super().__init__([*self._groups_of(self._muon), *self._groups_of(self._adamw)], {"lr": lr})
        self._share()

    @staticmethod
    def _groups_of(optimizer: torch.optim.Optimizer | None) -> list[dict[str, object]]:
        return optimizer.param_groups if optimizer else []

    def _share(self) -> None:
        """Give both this optimizer's groups and state, which loading a checkpoint replaces by others."""
        for optimizer, is_muon in ((self._muon, True), (self._adamw, False)):
            if optimizer:
                optimizer.param_groups = [group for group in self.param_groups if bool(group.get(_IS_MUON)) == is_muon]
                optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        for optimizer in (self._muon, self._adamw):
            if optimizer:
                optimizer.step()
        return loss
