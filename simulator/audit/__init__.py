"""The privacy audit: is the implementation as private as it claims to be? See docs/audit.md."""
