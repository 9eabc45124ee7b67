"""One codec per wire protocol: messages in, frames out. No I/O."""
