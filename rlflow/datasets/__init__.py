"""Datasets of other programs: read episode by episode into demonstrations, and written from them."""
