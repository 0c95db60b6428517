"""Folders to manifests: listing, layouts, examination, scan."""
