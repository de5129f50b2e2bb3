"""One module per encoding; each defines ``CODEC``, and :mod:`s2ap_deploy.codecs.registry` finds it."""
