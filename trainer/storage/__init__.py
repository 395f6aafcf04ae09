"""What is kept on disk, and what identifies it.

Five words for five kinds of hash:

- sha256: all bytes of a file or of named tensors, exact and cryptographic; in manifests and `summary.json`.
- digest: 64 bits over all weights, computed on the device and cheap enough for every logged row.
- fingerprint: SHA-256 of a data set's list of samples, without reading every file; in `environment.json`.
- key: 64 bits from a seed and a place in the run, which seed a random generator (`trainer.exact.seeding`).
- signature: no hash, but a model's input and output: shape, dtype, channels and class names; in `best/`.
"""
