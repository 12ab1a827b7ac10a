"""Pages of console."""

from fastapi import APIRouter

router = APIRouter()
