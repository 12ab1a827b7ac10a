"""Proves that no store ever holds a secret: credentials in URLs are refused before any work, and those in the environment stay there."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ommatid.config import Params, load_params
from ommatid.errors import ArtefactError, ConfigError, without_credentials
from ommatid.store.filesystem import open_folder
from support.study import CHECKOUT

SECRET = "canary0secret"

OVERRIDES = [
    f"label.labellers=[{{kind: vlm, model: m, url: 'http://user:{SECRET}@host/v1'}}]",
    f"label.labellers=[{{kind: vlm, model: m, url: 'http://{SECRET}@host/v1'}}]",
    f"label.labellers=[{{kind: vlm, model: m, url: 'ftp://user:{SECRET}@host/v1'}}]",
    f"label.labellers=[{{kind: vlm, model: m, url: 'http://user:{SECRET}/x@host/v1'}}]",
    f"label.labellers=[{{kind: vlm, model: m, url: 'http://us@er:{SECRET}@host/v1'}}]",
    f"label.labellers=[{{kind: vlm, model: m, url: 'http://host/v1?key={SECRET}'}}]",
    f"images.source={{kind: parquet, path: 'https://host/a.parquet?X-Amz-Signature={SECRET}'}}",
    f"label.labellers=[{{kind: vocabulary, words: ['http://user:{SECRET}@host/words.txt']}}]",
    f"label.labellers=[{{kind: human, path: 'http://user:{SECRET}@host/labels.csv'}}]",
    f"label.labellers=[{{kind: captioner, path: 'https://user:{SECRET}@hub/model'}}]",
    f"images.source={{kind: folder, path: 's3://user:{SECRET}@bucket/photos'}}",
    f"images.source={{kind: parquet, path: 'https://user:{SECRET}@host/a.parquet'}}",
    f"extract.executor={{kind: dask, workers: 1, address: 'tls://user:{SECRET}@host:8786'}}",
    f"extract.executor={{kind: ray, workers: 1, address: 'ray://user:{SECRET}@host:10001'}}",
    f"extract.model={{kind: clip, path: 'https://user:{SECRET}@hub/model'}}",
    f"extract={{source: files, path: 'http://user:{SECRET}@host/x.npy', name: x, model: m}}",
    f"train.variant={{kind: imported, path: 'http://user:{SECRET}@host/sae'}}",
    f"train.variant={{kind: imported, path: sae, values: {{from: 'http://user:{SECRET}@host/sae'}}}}",
    f"train.runs=[{{variant: {{kind: imported, path: 'http://user:{SECRET}@host/sae'}}}}]",
]


@pytest.mark.parametrize("override", OVERRIDES)
def test_credentials_in_any_url_of_the_params_are_refused_without_repeating_them(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_params(CHECKOUT / "params.yaml", [override])
    said = str(error.value)
    assert override.partition("=")[0].partition(".")[0] in said
    assert SECRET not in said
    assert "contains a URL with a user name, a password or a query" in said and "OPENAI_API_KEY" in said


def test_values_that_only_look_like_credentials_are_accepted() -> None:
    for path in ("s3://bucket/photos@2x", "http://host:8000/a@b", "me@work/photos", "photos: 5@home"):
        assert load_params(CHECKOUT / "params.yaml", [f"images.source={{kind: folder, path: '{path}'}}"]).images.source.path == path
        assert without_credentials(path) == path
    assert without_credentials("at https://a:b@c/d and s3://e:f@g: no") == "at https://c/d and s3://g: no"


def test_a_data_root_with_credentials_is_refused() -> None:
    with pytest.raises(ArtefactError) as error:
        open_folder(f"http://user:{SECRET}@host/data")
    assert SECRET not in str(error.value) and "http://host/data" in str(error.value)


def test_a_refused_run_leaves_the_secret_nowhere_but_in_params_yaml(tmp_path: Path) -> None:
    values: dict[str, Any] = yaml.safe_load((CHECKOUT / "params.yaml").read_text())
    values["label"]["labellers"] = [{"kind": "vlm", "model": "m", "url": f"http://user:{SECRET}@host/v1"}]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    for verb in ("label", "estimate"):
        done = subprocess.run([sys.executable, "-m", "ommatid", verb], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: params.yaml: label.labellers.0: url contains")
        assert SECRET not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["params.yaml"]


def test_prefect_refuses_a_labellers_url_with_credentials_before_storing_it() -> None:
    import re

    schema = Params.model_json_schema()["$defs"]["VlmLabeller"]["properties"]["url"]
    assert re.fullmatch(schema["pattern"], "http://host:8000/v1")
    assert not re.fullmatch(schema["pattern"], f"http://user:{SECRET}@host/v1")
