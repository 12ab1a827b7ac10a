"""Pages of classes."""

from fastapi import APIRouter

router = APIRouter()
