//! The file that ships: bytes to a validated bundle and back.
