"""The params: type, bounds and description of every key in params.yaml; the values are in that file alone."""

from ommatid.config.drift import DriftParams
from ommatid.config.evaluate import Baseline, EvaluateParams
from ommatid.config.extract import Executor, ExtractFiles, ExtractParams
from ommatid.config.images import Cifar10Source, FolderSource, ImageSource, ImagesParams, ParquetSource, ShapesSource, WebDatasetSource
from ommatid.config.intervene import InterveneParams
from ommatid.config.label import Labeller, LabelParams
from ommatid.config.load import dotted, load_params, make_params
from ommatid.config.models import Model
from ommatid.config.params import CatalogParams, Margins, Params, RetrainParams
from ommatid.config.section import Section
from ommatid.config.strict_yaml import parse_json
from ommatid.config.train import TrainParams
from ommatid.config.variants import Imported, TrainedVariant, Variant

__all__ = [
    "STAGE_NAMES",
    "Baseline",
    "CatalogParams",
    "Cifar10Source",
    "DriftParams",
    "EvaluateParams",
    "Executor",
    "ExtractFiles",
    "ExtractParams",
    "FolderSource",
    "ImageSource",
    "ImagesParams",
    "Imported",
    "InterveneParams",
    "LabelParams",
    "Labeller",
    "Margins",
    "Model",
    "Params",
    "ParquetSource",
    "RetrainParams",
    "Section",
    "ShapesSource",
    "TrainParams",
    "TrainedVariant",
    "Variant",
    "WebDatasetSource",
    "dotted",
    "load_params",
    "make_params",
    "parse_json",
]

STAGE_NAMES = ("images", "extract", "train", "evaluate", "label", "intervene", "catalog")
"""Names of the stages in the order in which the pipeline runs them. Each has a section of params.yaml and a room."""
