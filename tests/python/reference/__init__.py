"""Float64 NumPy references, written for clarity. They share nothing with the library.

SPDX-License-Identifier: Apache-2.0
"""
