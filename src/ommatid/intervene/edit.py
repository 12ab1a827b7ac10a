"""Edits of activations along the directions of latents: x' = x + (t − c) d, at one hookpoint.

c is a latent's activation, d its row of W_dec, both as the SAE stores them, and t its new activation, which the dose sets.

Suffixes: b images, t tokens of the model, k kept tokens, d width of the edited activations, n latents of an editor, l latents of an edit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never, get_args

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from ommatid.errors import InputError, ModelError
from ommatid.extract.tokens import TokenPicker
from ommatid.sae.model import SAE
from ommatid.vlm import Replacement

Kind = Literal["set", "add", "scale", "ablate"]
Unit = Literal["relative", "absolute"]
Where = Literal["all", "firing", "cls"]
ErrorTerm = Literal["keep", "drop"]

ENTRIES = 2**24
"""Number of activations (tokens x latents) that are computed at a time; they take 64 MB."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one latent's activation c to t, or of several latents' at once.

    Several latents do not compose: what they do together need not be the sum of what each does alone (arXiv 2603.25075).

    Raises:
        InputError: A value is not allowed: a dose that is not a finite number, a latent that is named twice, a mask without a token.
    """

    latents: tuple[int, ...]
    """The latents, each named once. All get the same dose."""
    kind: Kind
    """What the dose sets:

    - set: t = dose
    - add: t = c + dose
    - scale: t = dose · c
    - ablate: t = 0
    """
    dose: float | None = None
    """The dose; None if latents are ablated."""
    unit: Unit = "relative"
    """Unit of doses that are set or added: relative to each latent's own scale (see `Editor`), or absolute, in units of its activations."""
    tokens: Where | Tensor = "all"
    """Kept tokens that are edited: all, those on which any of the latents fires, the class token, or those of a mask, `(k,)` or `(b, k)` of
    bool."""
    error: ErrorTerm = "keep"
    """Whether the SAE's error x − x̂ is kept. If it is dropped, x̂ replaces x on all kept tokens, edited or not, as in the steering that
    Pach et al. published (arXiv 2504.02821); the effect of an edit is then mixed with that of reconstruction."""

    def __post_init__(self) -> None:
        for name, value, allowed in (("kind", self.kind, Kind), ("unit", self.unit, Unit), ("error", self.error, ErrorTerm)):
            _check_choice(name, value, get_args(allowed))
        if not self.latents or len(set(self.latents)) < len(self.latents):
            raise InputError(f"latents are {self.latents}; name one or more latents, each once")
        self._check_dose()
        if not isinstance(self.tokens, Tensor):
            _check_choice("tokens", self.tokens, get_args(Where), ", or a mask of the kept tokens")
        elif self.tokens.dtype != torch.bool or self.tokens.ndim not in (1, 2):
            shape = tuple(self.tokens.shape)
            raise InputError(f"tokens: the mask is {self.tokens.dtype} {shape}; give bool (kept tokens,) or (images, kept tokens)")
        elif not self.tokens.any():
            raise InputError("tokens: the mask is False everywhere, so the edit would change nothing; choose at least one token")

    def _check_dose(self) -> None:
        if self.kind == "ablate":
            if self.dose is not None:
                raise InputError(f"dose is {self.dose!r}, but ablate sets activations to 0 and takes none; leave it out, or use set")
        elif isinstance(self.dose, bool) or not isinstance(self.dose, int | float) or not math.isfinite(self.dose):
            raise InputError(f"dose is {self.dose!r}; {self.kind} needs a finite number")


def _check_choice(name: str, value: object, allowed: Sequence[str], more: str = "") -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; allowed values are {', '.join(allowed)}{more}")


@dataclass(frozen=True, eq=False)
class Codes:
    """What an SAE says of the tokens of one batch of images."""

    acts: Float32[Tensor, "batch kept latents"]
    """Activations of the editor's latents, `(b, k, n)` float32."""
    x_hat: Float32[Tensor, "batch kept d_out"] | None
    """Reconstruction x̂, `(b, k, d)` float32; None unless it was asked for."""

    @property
    def reconstruction(self) -> Float32[Tensor, "batch kept d_out"]:
        """Reconstruction x̂, `(b, k, d)` float32, which must have been asked for."""
        assert self.x_hat is not None
        return self.x_hat


Delta = Callable[[Float32[Tensor, "batch kept latents"]], Float32[Tensor, "batch kept d_out"]]
"""Function from the changes t − c of an edit's latents, `(b, k, l)`, to what is added to the kept tokens, `(b, k, d)`. Tokens whose changes
are all zero stay as they are, whatever is returned for them."""


class Editor:
    """Makes edits of some latents into functions that `VisionModel.splice` takes.

    Tokens are encoded once per batch of images, whatever the number of edits. Tokens and special tokens that the policy does not keep are
    never changed, and neither are kept tokens that an edit does not choose or whose activation it does not change: they stay equal bit
    for bit, unless the error is dropped. Changes are computed in float32 and rounded once, to the dtype of the tokens. They are constants
    to autograd: no gradient passes through the encoder.
    """

    def __init__(
        self,
        sae: SAE,
        latents: Sequence[int],
        writes: TokenPicker,
        reads: TokenPicker | None = None,
        scales: Float[Tensor, " d_sae"] | None = None,
        device: str = "cpu",
    ) -> None:
        """Bind an SAE to the hookpoint at which it is used.

        Args:
            sae: The SAE.
            latents: All latents that are to be edited.
            writes: Picker of the tokens that are edited.
            reads: For a transcoder, picker of the tokens that are encoded; None for an autoencoder, which encodes those that are edited.
            scales: Unit of relative doses, `(d_sae,)`: the 99th percentile of each latent's positive activations. None if all doses are
                absolute.
            device: Device of the model.

        Raises:
            InputError: A latent does not exist, or its direction is zero.
            ModelError: The tokens do not fit the SAE, or cannot be put back into the model.
        """
        self.sae = SAE(sae.config, **{name: tensor.to(device, torch.float32) for name, tensor in sae.tensors().items()})
        """The SAE, on the device."""
        self.latents = tuple(latents)
        """All latents that can be edited."""
        self.writes = writes
        """Picker of the tokens that are edited."""
        self.reads = reads or writes
        """Picker of the tokens that are encoded."""
        self._is_transcoder = sae.config.target is not None
        self._check_tokens()
        if odd := [latent for latent in self.latents if not 0 <= latent < sae.n_latents]:
            raise InputError(f"latent {odd[0]} does not exist; {sae.name} has latents 0 to {sae.n_latents - 1}")
        self._indices = torch.tensor(self.latents, dtype=torch.int64, device=device)
        lengths = self.directions(self.latents).norm(dim=1).tolist()
        if odd := [latent for latent, length in zip(self.latents, lengths, strict=True) if not 0 < length < math.inf]:
            raise InputError(f"latent {odd[0]}: its direction in W_dec is zero or not finite, so it cannot be edited")
        if scales is not None and len(scales) != sae.n_latents:
            raise InputError(f"scales are for {len(scales)} latents, but {sae.name} has {sae.n_latents}")
        self._scales = None if scales is None else scales.to(device, torch.float32)
        self._seen: tuple[Tensor, Codes] | None = None

    def directions(self, latents: Sequence[int]) -> Float32[Tensor, "latents d_out"]:
        """Return the directions of latents as the SAE stores them, `(latents, d)`."""
        return self.sae.W_dec[list(latents)]

    def doses(self, edit: Edit) -> Float32[Tensor, " edited"]:
        """Return the dose of each latent of an edit, `(l,)` float32: absolute if it is set or added, a factor if activations are scaled.

        Raises:
            InputError: The dose is relative, but a latent has no scale, because it never fires.
        """
        dose = edit.dose or 0.0
        if edit.kind in ("scale", "ablate"):
            return torch.full((len(edit.latents),), dose, device=self._indices.device)
        doses = self._units(edit) * dose
        if not doses.isfinite().all():
            raise InputError(f"dose {edit.dose} is too large: the activation that it sets is not finite")
        return doses

    def read(self, x_btd: Float[Tensor, "batch tokens d_model"], reconstruct: bool = False) -> Codes:
        """Encode a batch of images.

        Args:
            x_btd: All tokens at the hookpoint that is read, `(b, t, d_model)`.
            reconstruct: Whether to compute x̂ as well.

        Returns:
            The activations of the editor's latents, and x̂ if it was asked for.
        """
        found = self._codes_of(self.reads.pick(x_btd), None, reconstruct)
        return found if reconstruct else Codes(found.acts, None)

    def untouched(self, codes: Codes | None = None) -> Replacement:
        """Make the replacement of the kept tokens by x̂: what reconstruction alone does.

        Args:
            codes: As for `replacement`.

        Raises:
            InputError: As for `replacement`.
        """
        self._check_codes(codes, reconstruct=True)

        def replace(tokens: Float[Tensor, "batch tokens d_out"]) -> Float[Tensor, "batch tokens d_out"]:
            kept = self.writes.pick(tokens)
            return self.writes.put(tokens, self._codes_of(kept, codes, reconstruct=True).reconstruction)

        return replace

    def replacement(self, edit: Edit, codes: Codes | None = None, delta: Delta | None = None) -> Replacement:
        """Make an edit into a replacement for `VisionModel.splice`.

        Args:
            edit: The edit.
            codes: Result of `read` on the images that the replacement is used for, with `reconstruct` if the edit drops the error. A
                transcoder needs it. None if the tokens at the edited hookpoint are to be encoded.
            delta: Function that computes what is added to the kept tokens; None for the edit itself, Σ (t − c) d. Controls put something
                else in its place.

        Returns:
            The function from tokens `(b, t, d)` to edited tokens of the same shape and dtype.

        Raises:
            InputError: The edit does not fit the editor, or codes are missing.
        """
        self._check_edit(edit)
        drops = edit.error == "drop"
        self._check_codes(codes, reconstruct=drops)
        columns = [self.latents.index(latent) for latent in edit.latents]
        directions, doses = self.directions(edit.latents), self.doses(edit)

        def replace(tokens: Float[Tensor, "batch tokens d_out"]) -> Float[Tensor, "batch tokens d_out"]:
            kept = self.writes.pick(tokens)
            found = self._codes_of(kept, codes, reconstruct=drops)
            acts = found.acts[..., columns]
            changes = torch.where(self.chosen(edit.tokens, acts)[..., None], _changes(edit.kind, acts, doses), 0.0)
            base = found.reconstruction if drops else kept
            with _in_float32(kept):
                edited = base.float() + (delta(changes) if delta else changes @ directions)
            is_changed = (changes != 0).any(-1, keepdim=True)
            return self.writes.put(tokens, torch.where(is_changed, edited.to(kept.dtype), base.to(kept.dtype)))

        return replace

    def forget(self) -> None:
        """Let go of the tokens that were encoded last, which would stay in memory for as long as the editor does."""
        self._seen = None

    def _codes_of(self, kept: Float[Tensor, "batch kept d_out"], codes: Codes | None, reconstruct: bool) -> Codes:
        """Return the codes that were given, or else those of the kept tokens, which are computed once for all edits of the same tokens."""
        if codes is not None:
            if codes.acts.shape[:2] != kept.shape[:2]:
                shapes = f"{tuple(codes.acts.shape[:2])}, and the tokens that are edited for {tuple(kept.shape[:2])}"
                raise InputError(f"codes are for (images, kept tokens) = {shapes}; make the replacements anew for each batch")
            return codes
        x = kept.detach().float()
        # Tokens are compared by value: models may pass another copy to each replacement, and buffers may be filled anew.
        if self._seen and torch.equal(self._seen[0], x) and (self._seen[1].x_hat is not None or not reconstruct):
            return self._seen[1]
        found = self._encode(x, reconstruct)
        self._seen = x.clone(), found
        return found

    @torch.no_grad()
    def _encode(self, x_bkd: Float32[Tensor, "batch kept d_model"], reconstruct: bool) -> Codes:
        acts, decoded = [], []
        with _in_float32(x_bkd):
            for rows in x_bkd.flatten(0, 1).split(max(1, ENTRIES // self.sae.n_latents)):
                if reconstruct:
                    all_acts = self.sae.encode(rows)
                    acts.append(all_acts[:, self._indices])
                    decoded.append(self.sae.decode(all_acts))
                else:
                    acts.append(self.sae.encode_latents(rows, self._indices))
        shape = x_bkd.shape[:2]
        return Codes(torch.cat(acts).unflatten(0, shape), torch.cat(decoded).unflatten(0, shape) if reconstruct else None)

    def chosen(self, tokens: Where | Tensor, acts_bkl: Float32[Tensor, "batch kept edited"]) -> Bool[Tensor, "batch kept"]:
        """Return whether each kept token is edited, `(b, k)`, given the activations of an edit's latents and its choice of tokens."""
        if isinstance(tokens, Tensor):
            if tokens.ndim == 2 and len(tokens) != len(acts_bkl):
                raise InputError(f"tokens: the mask is for {len(tokens)} images, but the batch has {len(acts_bkl)}")
            return tokens.to(acts_bkl.device).expand(acts_bkl.shape[:2])
        match tokens:
            case "all":
                return torch.ones_like(acts_bkl[..., 0], dtype=torch.bool)
            case "firing":
                return (acts_bkl > 0).any(-1)
            case "cls":
                return torch.tensor(self._is_cls, device=acts_bkl.device).expand(acts_bkl.shape[:2])
            case _:
                assert_never(tokens)

    @property
    def _is_cls(self) -> list[bool]:
        return [place.kind == "cls" for place in self.writes.places]

    def _units(self, edit: Edit) -> Float32[Tensor, " edited"]:
        """Return the unit of the dose for each latent of an edit, `(l,)`."""
        if edit.unit == "absolute":
            return torch.ones(len(edit.latents), device=self._indices.device)
        if self._scales is None:
            raise InputError("the dose is relative, but the scales of latents are not known; give scales, or set unit to absolute")
        units = self._scales[list(edit.latents)]
        if odd := [latent for latent, unit in zip(edit.latents, units.tolist(), strict=True) if not 0 < unit < math.inf]:
            reason = f"its scale is {float(self._scales[odd[0]])}, as of a latent that never fires"
            raise InputError(
                f"latent {odd[0]}: {reason}, so no dose is relative to it; set unit to absolute, or choose a latent that fires"
            )
        return units

    def _check_tokens(self) -> None:
        reads, writes = self.reads.hookpoint, self.writes.hookpoint
        if self._is_transcoder != (self.reads != self.writes):
            need = f"give the pickers of {self.sae.config.hookpoint} to read and of {self.sae.config.target} to write"
            raise ModelError(
                f"{self.sae.name} is a transcoder, which reads one hookpoint and writes another; {need}"
                if self._is_transcoder
                else f"{self.sae.name} is an autoencoder, which writes the hookpoint that it reads, {self.reads.name}; leave out `reads`"
            )
        for picker, width, d_sae in ((self.reads, reads.d_model, self.sae.d_model), (self.writes, writes.d_model, self.sae.d_out)):
            if width != d_sae:
                raise ModelError(f"{picker.name} is {width} wide, but the SAE {d_sae}; use the SAE with the model that it was trained on")
        if len(self.reads.places) != len(self.writes.places):
            counts = f"{len(self.reads.places)} tokens are kept at {self.reads.name} and {len(self.writes.places)} at {self.writes.name}"
            raise ModelError(f"{counts}; a transcoder needs the same tokens at both")
        # Fails at once if the policy keeps what cannot be put back.
        self.writes.put(torch.empty(0, writes.n_tokens, 0), torch.empty(0, len(self.writes.places), 0))

    def _check_edit(self, edit: Edit) -> None:
        if odd := [latent for latent in edit.latents if latent not in self.latents]:
            raise InputError(f"latent {odd[0]} is not among those that the editor was made for: {', '.join(map(str, self.latents))}")
        n_kept = len(self.writes.places)
        if isinstance(edit.tokens, Tensor):
            if edit.tokens.shape[-1] != n_kept:
                raise InputError(f"tokens: the mask has {edit.tokens.shape[-1]} tokens, but {n_kept} are kept at {self.writes.name}")
        elif edit.tokens == "cls" and not any(self._is_cls):
            kinds = ", ".join(dict.fromkeys(place.kind for place in self.writes.places))
            raise InputError(
                f"tokens is 'cls', but no class token is kept at {self.writes.name}, only {kinds}; set tokens to all or firing"
            )

    def _check_codes(self, codes: Codes | None, reconstruct: bool) -> None:
        if codes is None and self._is_transcoder:
            raise InputError(f"a transcoder encodes the tokens at {self.reads.name}: capture them, `read` them, and give the codes")
        if codes is not None and codes.x_hat is None and reconstruct:
            raise InputError("x̂ is needed, but the codes have none; make them with `read(tokens, reconstruct=True)`")


def _in_float32(x: Tensor) -> torch.autocast:
    """Return a context in which products on the device of x are not cast, although the model may call replacements under autocast."""
    return torch.autocast(x.device.type, enabled=False)


def _changes(
    kind: Kind, acts_bkl: Float32[Tensor, "batch kept edited"], doses: Float32[Tensor, " edited"]
) -> Float32[Tensor, "batch kept edited"]:
    """Return t − c, `(b, k, l)`."""
    match kind:
        case "set":
            return doses - acts_bkl
        case "add":
            return doses.expand_as(acts_bkl)
        case "scale":
            return (doses - 1) * acts_bkl
        case "ablate":
            return -acts_bkl
        case _:
            assert_never(kind)
