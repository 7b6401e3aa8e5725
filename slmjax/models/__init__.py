"""Definitions of decoders: protocols, layers, mixers, feed-forward layers, the architecture's config and the
named models.
"""
