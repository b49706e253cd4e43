//! Streams and events: order and time on the GPU. Each handle is released when it is dropped.

use cudarc::driver::{result, sys};

use super::device::{Device, failed};
use crate::error::RuntimeError;

/// A stream of its own, destroyed on drop.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    raw: sys::CUstream,
}

// SAFETY: driver handles may be used from any thread; the struct never changes after creation.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that does not wait for the default stream.
    pub fn new(device: &Device) -> Result<Self, RuntimeError> {
        let _current = device.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("create a stream"))?;
        Ok(Self { device: device.clone(), raw })
    }

    /// Its `CUstream` handle, as [`crate::cuda::Engine::attention`] takes it.
    pub fn raw(&self) -> u64 {
        self.raw as usize as u64
    }

    /// The handle itself.
    pub(super) fn handle(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits for everything submitted to it.
    pub fn synchronize(&self) -> Result<(), RuntimeError> {
        let _current = self.device.bind()?;
        // SAFETY: created by `Stream::new`, destroyed only on drop.
        unsafe { result::stream::synchronize(self.raw) }.map_err(failed("wait for a stream"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let destroyed = self.device.bind().and_then(|_current| {
            // SAFETY: created by `Stream::new`, owned by this value, destroyed once. Submitted work still completes.
            unsafe { result::stream::destroy(self.raw) }.map_err(failed("destroy a stream"))
        });
        if let Err(error) = destroyed {
            tracing::debug!(%error, "a stream was not destroyed");
        }
    }
}

/// A `CUstream` handle from its number.
pub(super) fn handle(stream: u64) -> sys::CUstream {
    stream as usize as sys::CUstream
}

/// A point in the work of a stream, destroyed on drop.
#[derive(Debug)]
pub(super) struct Event {
    device: Device,
    raw: sys::CUevent,
}

// SAFETY: driver handles may be used from any thread; the struct never changes after creation.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    fn with_flags(device: &Device, flags: sys::CUevent_flags) -> Result<Self, RuntimeError> {
        let _current = device.bind()?;
        let raw = result::event::create(flags).map_err(failed("create an event"))?;
        Ok(Self { device: device.clone(), raw })
    }

    /// An event that orders work; it measures no time.
    pub(super) fn new(device: &Device) -> Result<Self, RuntimeError> {
        Self::with_flags(device, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// An event that measures time.
    fn timed(device: &Device) -> Result<Self, RuntimeError> {
        Self::with_flags(device, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// Marks what `stream` was given so far.
    ///
    /// # Safety
    /// The device's context is current, and `stream` is a live stream of it or null.
    pub(super) unsafe fn record(&self, stream: sys::CUstream) -> Result<(), RuntimeError> {
        // SAFETY: the event lives; the rest is the caller's promise.
        unsafe { result::event::record(self.raw, stream) }.map_err(failed("record an event"))
    }

    /// Makes later work of `stream` wait for what was marked last.
    ///
    /// # Safety
    /// As for [`Event::record`].
    pub(super) unsafe fn delay(&self, stream: sys::CUstream) -> Result<(), RuntimeError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event lives; the rest is the caller's promise.
        unsafe { result::stream::wait_event(stream, self.raw, flags) }.map_err(failed("make a stream wait"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let destroyed = self.device.bind().and_then(|_current| {
            // SAFETY: created by `with_flags`, owned by this value, destroyed once.
            unsafe { result::event::destroy(self.raw) }.map_err(failed("destroy an event"))
        });
        if let Err(error) = destroyed {
            tracing::debug!(%error, "an event was not destroyed");
        }
    }
}

/// The capture that `stream` is part of, by a number that no other capture of the program has.
///
/// # Safety
/// `stream` is a live stream of the context that is current, or null.
pub(super) unsafe fn capture_of(stream: sys::CUstream) -> Result<Option<u64>, RuntimeError> {
    const NONE: sys::CUstreamCaptureStatus = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let action = "ask whether a stream is captured";
    // The shorter question first: most streams are not.
    // SAFETY: the caller's promise.
    if unsafe { result::stream::is_capturing(stream) }.map_err(failed(action))? == NONE {
        return Ok(None);
    }
    let (mut status, mut id) = (NONE, 0);
    let (graph, dependencies, count) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the stream is the caller's promise; the driver writes to the places given and skips those that are null.
    unsafe { sys::cuStreamGetCaptureInfo_v2(stream, &mut status, &mut id, graph, dependencies, count) }
        .result()
        .map_err(failed(action))?;
    Ok((status != NONE).then_some(id))
}

/// `CU_STREAM_PER_THREAD`.
const PER_THREAD: usize = 2;

/// Launches of one order run one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Those of a stream, by its handle: what belongs to it, the driver releases only once all its work is done.
    Stream(usize),
    /// Those of a thread's default stream, by its id: all have one handle.
    PerThread(u64),
    /// Those that a stream leaves in a graph. The stream outlives its capture, so the handle tells it from others.
    Captured { capture: u64, stream: usize },
}

impl Order {
    /// Where work that `stream` is given now belongs, given [`capture_of`] it.
    ///
    /// # Safety
    /// `stream` is a live stream of the context that is current, or null.
    pub(super) unsafe fn of(stream: sys::CUstream, capture: Option<u64>) -> Result<Self, RuntimeError> {
        if let Some(capture) = capture {
            return Ok(Self::Captured { capture, stream: stream as usize });
        }
        if stream as usize != PER_THREAD {
            return Ok(Self::Stream(stream as usize));
        }
        let mut id = 0;
        // SAFETY: the stream is the caller's promise; the other argument is a valid place.
        unsafe { sys::cuStreamGetId(stream, &mut id) }.result().map_err(failed("ask for a stream's id"))?;
        Ok(Self::PerThread(id))
    }
}

/// Runs `work`, which allocates, while streams may be captured: nothing it does is part of what they record.
pub(super) fn relaxed_capture<T>(work: impl FnOnce() -> Result<T, RuntimeError>) -> Result<T, RuntimeError> {
    let exchange = |mode: &mut sys::CUstreamCaptureMode| {
        // SAFETY: the argument is a valid place, and any mode is a legal one.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(mode) }.result().map_err(failed("change the capture mode"))
    };
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    exchange(&mut mode)?;
    let done = work();
    exchange(&mut mode)?;
    done
}

/// Points in the work of one stream, and the GPU time between them.
#[derive(Debug)]
pub struct Marks {
    device: Device,
    events: Vec<Event>,
}

impl Marks {
    /// `count` marks on streams of `device`, none set.
    pub fn new(device: &Device, count: usize) -> Result<Self, RuntimeError> {
        let events = (0..count).map(|_| Event::timed(device)).collect::<Result<_, _>>()?;
        Ok(Self { device: device.clone(), events })
    }

    /// Sets mark `index` after everything submitted to `stream` so far.
    ///
    /// # Panics
    /// If there is no such mark.
    pub fn set(&mut self, index: usize, stream: &Stream) -> Result<(), RuntimeError> {
        let _current = self.device.bind()?;
        // SAFETY: the context is current, and the stream lives through the call.
        unsafe { self.events[index].record(stream.raw) }
    }

    /// Waits until the GPU has reached mark `index`, which must have been set.
    ///
    /// # Panics
    /// If there is no such mark.
    pub fn wait(&self, index: usize) -> Result<(), RuntimeError> {
        let _current = self.device.bind()?;
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.events[index].raw) }.map_err(failed("wait for an event"))
    }

    /// GPU milliseconds from one mark to another; both were set on one stream and reached.
    ///
    /// # Panics
    /// If there are no such marks.
    pub fn milliseconds(&self, from: usize, to: usize) -> Result<f32, RuntimeError> {
        let _current = self.device.bind()?;
        let [from, to] = [from, to].map(|index| self.events[index].raw);
        // SAFETY: both events live; one that was not reached is an error of the driver's.
        unsafe { result::event::elapsed(from, to) }.map_err(failed("read the time between two events"))
    }
}

/// Measures GPU time on one stream.
#[derive(Debug)]
pub struct Timer(Marks);

impl Timer {
    /// A timer for streams of `device`.
    pub fn new(device: &Device) -> Result<Self, RuntimeError> {
        Ok(Self(Marks::new(device, 2)?))
    }

    /// Milliseconds the GPU spends on what `submit` puts on `stream`; waits until that is done.
    pub fn measure(
        &mut self,
        stream: &Stream,
        submit: impl FnOnce() -> Result<(), RuntimeError>,
    ) -> Result<f32, RuntimeError> {
        let Self(marks) = self;
        marks.set(0, stream)?;
        submit()?;
        marks.set(1, stream)?;
        marks.wait(1)?;
        marks.milliseconds(0, 1)
    }
}
