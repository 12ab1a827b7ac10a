"""The explorer's model process with a TileModel in the place of every network, which hangs and dies when a text tells it to."""

import os
import time
from collections.abc import Sequence

import pytest
import torch

from ommatid.explorer.model_worker import main
from support.tiles import TileModel, use_tile_model


class FragileModel(TileModel):
    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        for text in texts:
            if "hang" in text:
                time.sleep(1000)
            elif "crash" in text:
                os._exit(7)
            elif "raise" in text:
                raise RuntimeError("a bug")
        return super().embed_text(texts)


if __name__ == "__main__":
    use_tile_model(pytest.MonkeyPatch(), FragileModel())
    main()
