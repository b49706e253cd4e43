//! Memory for tiles that are computed in parts ([`abi::SPLIT_TAIL`]): accumulators and arrival counters.
//!
//! Launches that may run at the same time must not share them, and which may is known by where they are submitted: work of one
//! stream runs in order, and so do replays of one graph. So each stream has its own piece of memory, and so has each stream of each
//! capture, which its graph keeps. The first piece is allocated with the engine, another one whenever launches come from somewhere
//! new; all live as long as the engine.

use std::sync::{Mutex, PoisonError};

use calibc_ir::abi;
use cudarc::driver::{result, sys};

use super::device::{Device, DeviceBuffer, failed};
use super::stream::{Order, Stream, relaxed_capture};
use crate::error::RuntimeError;

/// The pieces of memory of one engine.
#[derive(Debug)]
pub(super) struct Partials {
    device: Device,
    /// Bytes of a piece's accumulators; its counters follow.
    slots: usize,
    arrivals: usize,
    /// Clears counters, beside whatever is captured.
    clearing: Stream,
    pieces: Mutex<Vec<(Option<Order>, DeviceBuffer)>>,
}

impl Partials {
    /// For kernels of `head_dim` on a GPU of `multiprocessors` SMs.
    pub(super) fn new(device: &Device, head_dim: u32, multiprocessors: u32) -> Result<Self, RuntimeError> {
        let slots = (abi::SLOTS_PER_CTA * multiprocessors) as usize * abi::slot_bytes(head_dim) as usize;
        let arrivals = (multiprocessors * abi::warps(head_dim)) as usize * 4;
        let partials = Self {
            device: device.clone(),
            slots,
            arrivals,
            clearing: Stream::new(device)?,
            pieces: Mutex::new(Vec::new()),
        };
        let first = partials.piece()?;
        partials.lock().push((None, first));
        Ok(partials)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Option<Order>, DeviceBuffer)>> {
        // A panic elsewhere leaves the list whole: pieces are pushed complete.
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn piece(&self) -> Result<DeviceBuffer, RuntimeError> {
        let _current = self.device.bind()?;
        let buffer = self.device.alloc(self.slots + self.arrivals)?;
        // SAFETY: inside the allocation, which nothing else uses yet.
        unsafe { result::memset_d8_async(buffer.ptr() + self.slots as u64, 0, self.arrivals, self.clearing.handle()) }
            .map_err(failed("clear GPU memory"))?;
        self.clearing.synchronize()?;
        Ok(buffer)
    }

    /// The addresses of accumulators and counters for launches on `stream`, which is part of `capture`. Allocates for the first launch
    /// of a stream or capture.
    ///
    /// # Safety
    /// The device's context is current, and `stream` is a live stream of it or null.
    pub(super) unsafe fn of(&self, stream: sys::CUstream, capture: Option<u64>) -> Result<(u64, u64), RuntimeError> {
        // SAFETY: the caller's promise.
        let order = unsafe { Order::of(stream, capture) }?;
        let mut pieces = self.lock();
        let known = pieces.iter().position(|&(owner, _)| owner == Some(order));
        // Nobody's: the first one, until a stream claims it.
        let at = match known.or_else(|| pieces.iter().position(|(owner, _)| owner.is_none())) {
            Some(at) => at,
            None => {
                let piece = relaxed_capture(|| self.piece())?;
                pieces.push((None, piece));
                pieces.len() - 1
            }
        };
        pieces[at].0 = Some(order);
        let base = pieces[at].1.ptr();
        Ok((base, base + self.slots as u64))
    }

    /// Device memory they take.
    pub(super) fn bytes(&self) -> usize {
        self.lock().iter().map(|(_, piece)| piece.bytes()).sum()
    }
}
