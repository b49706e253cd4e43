//! A plan's tables in device memory, as [`calibc_ir::abi`] lays them out: those of all steps, masks once each, or a window of steps.

use std::sync::{Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};
use calibc_ir::{AnchorTable, AttnOp, Plan};
use cudarc::driver::{result, sys};

use super::device::{Device, DeviceBuffer, Pinned, failed};
use super::stream::{Event, Stream, capture_of, handle};
use crate::error::RuntimeError;
use crate::launch::{Params, StepArg};
use crate::residency::{Queues, Residency, StreamId, Window};
use crate::step_image::{StepImages, WorkList, list_count, op_word, splits};

/// Words of host memory that masks pass through on their way to the GPU (16 MiB).
const STAGING_WORDS: usize = 4 << 20;

/// The four tables of a step, in the order of [`calibc_ir::abi::STEP_TABLE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
struct StepTable {
    lists: u64,
    items: u64,
    ops: u64,
    masks: u64,
}

/// Words of a [`StepTable`].
const TABLE_WORDS: usize = size_of::<StepTable>() / 4;

/// One work list per (step, layer), step-major.
fn work_lists(plan: &Plan) -> Result<Vec<WorkList>, RuntimeError> {
    let schedule = plan.schedule.as_ref().ok_or(RuntimeError::Unscheduled)?;
    let heads = plan.model.heads as usize;
    let list = |(&list, ops): (&u32, &[AttnOp])| {
        let ends = &schedule.list_ptr[list as usize..][..2];
        WorkList { begin: ends[0], count: list_count((ends[1] - ends[0]) as usize, splits(ops)) }
    };
    Ok(schedule.list_of.iter().zip(plan.ops.chunks_exact(heads)).map(list).collect())
}

/// The tables of one plan. Held for their memory; kernels see the addresses in [`Tables::fill`].
#[derive(Debug)]
pub(super) struct Tables {
    anchors: Option<Anchors>,
    steps: Steps,
}

#[derive(Debug)]
struct Anchors {
    num_queries: u32,
    queries: DeviceBuffer,
    copy_ptr: DeviceBuffer,
    copies: DeviceBuffer,
}

#[derive(Debug)]
enum Steps {
    All(Resident),
    Window { uploads: Box<Mutex<Uploads>>, steps: u64, device_bytes: usize, host_bytes: usize },
}

impl Tables {
    /// Uploads the tables of a scheduled plan.
    pub(super) fn upload(
        device: &Device,
        plan: &Plan,
        anchors: Option<&AnchorTable>,
        residency: Residency,
    ) -> Result<Self, RuntimeError> {
        let anchors = match anchors {
            None => None,
            Some(table) => Some(Anchors {
                num_queries: table.queries.len() as u32,
                queries: device.upload(&table.queries)?,
                copy_ptr: device.upload(&table.copy_ptr)?,
                copies: device.upload(&table.copies)?,
            }),
        };
        let steps = match residency {
            Residency::Window(steps) if steps < 2 => return Err(RuntimeError::Window { steps }),
            Residency::Window(steps) if steps < plan.num_steps() => Steps::window(device, plan, steps as usize)?,
            Residency::All | Residency::Window(_) => Steps::All(Resident::upload(device, plan)?),
        };
        Ok(Self { anchors, steps })
    }

    /// Fills in the addresses.
    pub(super) fn fill(&self, params: &mut Params) {
        params.steps = match &self.steps {
            Steps::All(resident) => resident.steps.ptr(),
            Steps::Window { steps, .. } => *steps,
        };
        if let Some(anchors) = &self.anchors {
            params.num_anchor_queries = anchors.num_queries;
            params.anchor_queries = anchors.queries.ptr();
            params.anchor_copy_ptr = anchors.copy_ptr.ptr();
            params.anchor_copies = anchors.copies.ptr();
        }
    }

    /// Whether they are those of a window of steps.
    pub(super) fn is_window(&self) -> bool {
        matches!(self.steps, Steps::Window { .. })
    }

    /// Runs `launch`, which reads the tables of `step` on `stream`, with those tables in place. `captured`: whether the stream is.
    ///
    /// # Safety
    /// The device's context is current, and `stream` is a live stream of it or null.
    pub(super) unsafe fn launch(
        &self,
        step: StepArg,
        stream: sys::CUstream,
        captured: bool,
        launch: impl FnOnce() -> Result<(), RuntimeError>,
    ) -> Result<(), RuntimeError> {
        let Steps::Window { uploads, .. } = &self.steps else { return launch() };
        match (step, captured) {
            (StepArg::Host(step), true) => return Err(RuntimeError::CapturedStep { step }),
            // What replays of the graph will find there is for `enter` to see to.
            (StepArg::Device(_), true) => return launch(),
            _ => {}
        }
        let stream = stream as usize as StreamId;
        // Held over the launch: what it reads must not be replaced before its use is marked.
        let mut uploads = uploads.lock().unwrap_or_else(PoisonError::into_inner);
        let Uploads { window, queues } = &mut *uploads;
        match step {
            StepArg::Host(step) => {
                let slot = window.need(step, stream, queues)?;
                launch()?;
                window.used(slot, stream, queues)?;
                window.enter(step, queues)
            }
            StepArg::Device(_) => {
                window.need_any(stream, queues)?;
                launch()?;
                window.used_any(stream, queues)
            }
        }
    }

    /// See [`super::Engine::enter`].
    ///
    /// # Safety
    /// As for [`Tables::launch`].
    pub(super) unsafe fn enter(&self, step: u32, stream: sys::CUstream) -> Result<(), RuntimeError> {
        let enter = |window: &mut Window, queues: &mut CudaQueues, stream| {
            window.need(step, stream, queues)?;
            window.enter(step, queues)
        };
        // SAFETY: the caller's promise.
        unsafe { self.announce(step, stream, enter) }
    }

    /// See [`super::Engine::prefetch`].
    ///
    /// # Safety
    /// As for [`Tables::launch`].
    pub(super) unsafe fn prefetch(&self, step: u32, stream: sys::CUstream) -> Result<(), RuntimeError> {
        // SAFETY: the caller's promise.
        unsafe { self.announce(step, stream, |window, queues, _| window.prefetch(step, queues)) }
    }

    /// Changes the window after all that `stream` was given, which may read any step in it.
    unsafe fn announce(
        &self,
        step: u32,
        stream: sys::CUstream,
        change: impl FnOnce(&mut Window, &mut CudaQueues, StreamId) -> Result<(), RuntimeError>,
    ) -> Result<(), RuntimeError> {
        let Steps::Window { uploads, .. } = &self.steps else { return Ok(()) };
        // SAFETY: the caller's promise.
        if unsafe { capture_of(stream) }?.is_some() {
            return Err(RuntimeError::CapturedStep { step });
        }
        let stream = stream as usize as StreamId;
        let mut uploads = uploads.lock().unwrap_or_else(PoisonError::into_inner);
        let Uploads { window, queues } = &mut *uploads;
        window.used_any(stream, queues)?;
        change(window, queues, stream)
    }

    /// Device memory they take.
    pub(super) fn device_bytes(&self) -> usize {
        let anchors = self.anchors.iter().flat_map(|a| [&a.queries, &a.copy_ptr, &a.copies]);
        let steps = match &self.steps {
            Steps::All(resident) => resident.bytes(),
            Steps::Window { device_bytes, .. } => *device_bytes,
        };
        steps + anchors.map(DeviceBuffer::bytes).sum::<usize>()
    }

    /// Pinned host memory they take.
    pub(super) fn host_bytes(&self) -> usize {
        match &self.steps {
            Steps::All(_) => 0,
            Steps::Window { host_bytes, .. } => *host_bytes,
        }
    }
}

/// The tables of all steps.
#[derive(Debug)]
struct Resident {
    steps: DeviceBuffer,
    /// What `steps` points into.
    held: [DeviceBuffer; 4],
}

impl Resident {
    fn upload(device: &Device, plan: &Plan) -> Result<Self, RuntimeError> {
        let schedule = plan.schedule.as_ref().ok_or(RuntimeError::Unscheduled)?;
        let items: Vec<u32> = schedule.items.iter().map(|item| item.0).collect();
        let ops: Vec<u32> = plan.ops.iter().map(|&op| op_word(op, |mask| mask.0)).collect();
        let lists = device.upload(&work_lists(plan)?)?;
        let items = device.upload(&items)?;
        let ops = device.upload(&ops)?;
        let masks = upload_masks(device, plan)?;
        let layers = u64::from(plan.model.layers);
        let step_tables: Vec<StepTable> = (0..u64::from(plan.num_steps()))
            .map(|step| StepTable {
                lists: lists.ptr() + step * layers * size_of::<WorkList>() as u64,
                items: items.ptr(),
                ops: ops.ptr() + step * layers * u64::from(plan.model.heads) * 4,
                masks: masks.ptr(),
            })
            .collect();
        Ok(Self { steps: device.upload(&step_tables)?, held: [lists, items, ops, masks] })
    }

    fn bytes(&self) -> usize {
        self.held.iter().chain([&self.steps]).map(DeviceBuffer::bytes).sum()
    }
}

/// All masks, one after the other in id order, through a staging vector of bounded size.
fn upload_masks(device: &Device, plan: &Plan) -> Result<DeviceBuffer, RuntimeError> {
    let words = plan.masks.iter().map(|(_, mask)| mask.words().len()).sum::<usize>();
    let buffer = device.alloc(words * 4)?;
    let mut staging: Vec<u32> = Vec::with_capacity(words.min(STAGING_WORDS));
    let mut written = 0;
    for (_, mask) in plan.masks.iter() {
        if staging.len() + mask.words().len() > STAGING_WORDS {
            buffer.write(written, &staging)?;
            written += staging.len() * 4;
            staging.clear();
        }
        staging.extend_from_slice(mask.words());
    }
    buffer.write(written, &staging)?;
    Ok(buffer)
}

/// A window and what is behind it.
#[derive(Debug)]
struct Uploads {
    window: Window,
    queues: CudaQueues,
}

/// The device memory of a window, the host memory it is filled from, and the stream that does it.
#[derive(Debug)]
struct CudaQueues {
    copies: Stream,
    /// Ends of uploads, by slot.
    uploaded: Vec<Event>,
    /// Last uses, by slot; then the last one of any slot.
    used: Vec<Event>,
    images: StepImages,
    /// Images as `images` says; then the table of each step in each slot, slot-major; then the table of a step that is nowhere.
    host: Pinned,
    slots: DeviceBuffer,
    slot_bytes: u64,
    /// The tables of all steps; a step that is nowhere has empty work lists, so that a launch at it writes nothing.
    steps: DeviceBuffer,
    // The empty work lists.
    _nothing: DeviceBuffer,
}

impl Steps {
    /// A window of `slots` slots, the plan's first steps in them.
    fn window(device: &Device, plan: &Plan, slots: usize) -> Result<Self, RuntimeError> {
        let images = StepImages::new(plan)?;
        let num_steps = images.steps.len();
        let slot_bytes = 4 * images.slot_words();
        let memory = device.alloc(slots * slot_bytes)?;
        let nothing = device.upload(&vec![WorkList { begin: 0, count: 0 }; plan.model.layers as usize])?;
        let nowhere = StepTable { lists: nothing.ptr(), items: memory.ptr(), ops: memory.ptr(), masks: memory.ptr() };
        let mut host = device.pinned(images.host_words + (slots * num_steps + 1) * TABLE_WORDS)?;
        let (image_words, table_words) = host.words_mut().split_at_mut(images.host_words);
        images.write(plan, image_words)?;
        let tables = (0..slots).flat_map(|slot| {
            let base = memory.ptr() + (slot * slot_bytes) as u64;
            let at = move |words: usize| base + 4 * words as u64;
            (images.steps.iter()).map(move |image| StepTable {
                lists: base,
                items: at(image.items),
                ops: at(image.ops),
                masks: at(image.masks),
            })
        });
        for (to, table) in table_words.chunks_exact_mut(TABLE_WORDS).zip(tables.chain([nowhere])) {
            to.copy_from_slice(bytemuck::cast_slice(&[table]));
        }
        let host_bytes = size_of_val(host.words());
        let steps = device.upload(&vec![nowhere; num_steps])?;
        let device_bytes = memory.bytes() + steps.bytes() + nothing.bytes();
        let address = steps.ptr();
        let events = |count| (0..count).map(|_| Event::new(device)).collect::<Result<Vec<_>, _>>();
        let mut queues = CudaQueues {
            copies: Stream::new(device)?,
            uploaded: events(slots)?,
            used: events(slots + 1)?,
            images,
            host,
            slots: memory,
            slot_bytes: slot_bytes as u64,
            steps,
            _nothing: nothing,
        };
        let mut window = Window::new(slots, num_steps as u32);
        {
            let _current = device.bind()?;
            (0..slots as u32).try_for_each(|step| window.prefetch(step, &mut queues))?;
        }
        // What goes wrong with the first uploads is told here.
        queues.copies.synchronize()?;
        let uploads = Box::new(Mutex::new(Uploads { window, queues }));
        Ok(Self::Window { uploads, steps: address, device_bytes, host_bytes })
    }
}

impl CudaQueues {
    /// Copies `words` words of host memory to the GPU.
    fn copy(&self, to: u64, host: usize, words: usize) -> Result<(), RuntimeError> {
        let from = &self.host.words()[host..host + words];
        // SAFETY: a context is current (all callers of a window see to it); the target lies in `slots` or `steps`, whose layouts
        // were made with `images`; the source is pinned, never written again, and lives until the copies are done: an engine
        // waits for the GPU before it is dropped.
        unsafe { result::memcpy_htod_async(to, from, handle(self.copies.raw())) }
            .map_err(failed("copy a step's tables to the GPU"))
    }

    /// Makes `table`, by its place in host memory, the table of `step`.
    fn set_table(&self, step: u32, table: usize) -> Result<(), RuntimeError> {
        let to = self.steps.ptr() + u64::from(step) * size_of::<StepTable>() as u64;
        self.copy(to, self.images.host_words + table * TABLE_WORDS, TABLE_WORDS)
    }
}

impl Drop for CudaQueues {
    fn drop(&mut self) {
        // The copies read `host` and write `slots`.
        if let Err(error) = self.copies.synchronize() {
            tracing::debug!(%error, "waiting for uploads failed");
        }
    }
}

// SAFETY of the calls below: windows are used with the device's context current and with live streams (`Tables::launch`).
impl Queues for CudaQueues {
    type Error = RuntimeError;

    fn record_use(&mut self, slot: usize, stream: StreamId) -> Result<(), RuntimeError> {
        // SAFETY: see above.
        unsafe { self.used[slot].record(handle(stream)) }
    }

    fn await_use(&mut self, slot: usize) -> Result<(), RuntimeError> {
        // SAFETY: see above; the stream is this value's own.
        unsafe { self.used[slot].delay(handle(self.copies.raw())) }
    }

    fn upload(&mut self, slot: usize, step: u32, evicted: Option<u32>) -> Result<(), RuntimeError> {
        let num_steps = self.images.steps.len();
        if let Some(evicted) = evicted {
            self.set_table(evicted, self.uploaded.len() * num_steps)?;
        }
        let base = self.slots.ptr() + slot as u64 * self.slot_bytes;
        for run in &self.images.steps[step as usize].runs {
            self.copy(base + 4 * run.image as u64, run.host, run.words)?;
        }
        self.set_table(step, slot * num_steps + step as usize)?;
        // SAFETY: see above; the stream is this value's own.
        unsafe { self.uploaded[slot].record(handle(self.copies.raw())) }
    }

    fn await_upload(&mut self, slot: usize, stream: StreamId) -> Result<(), RuntimeError> {
        // SAFETY: see above.
        unsafe { self.uploaded[slot].delay(handle(stream)) }
    }
}

#[cfg(test)]
mod tests {
    use calibc_ir::{AttnOp, BlockMask, Geometry, Model, Schedule, WorkItem, abi};

    use super::*;

    #[test]
    fn words_and_lists_follow_the_contract() {
        let model = Model { name: "m".into(), layers: 2, heads: 2, head_dim: 64 };
        let mut plan = Plan::dense(model, Geometry::video(2, 10, 20), vec![1.0]);
        let ids = [BlockMask::full(4, 4), BlockMask::from_fn(4, 4, |r, c| r == c)].map(|m| plan.masks.intern(m));
        plan.ops[1] = AttnOp::BlockSparse { mask: ids[1] };
        plan.ops[2] = AttnOp::AnchorRows { anchors: 5 };
        let words: Vec<u32> = plan.ops.iter().map(|&op| op_word(op, |mask| mask.0)).collect();
        assert_eq!(words, [u32::MAX, 1, u32::MAX - 1, u32::MAX]);
        assert!(matches!(work_lists(&plan), Err(RuntimeError::Unscheduled)));
        let items = (0..7).map(WorkItem).collect();
        plan.schedule = Some(Schedule { list_of: vec![1, 0], list_ptr: vec![0, 3, 7], items });
        // The second layer has no mask.
        let lists = [WorkList { begin: 3, count: 4 }, WorkList { begin: 0, count: 3 | abi::SPLIT_TAIL }];
        assert_eq!(work_lists(&plan).unwrap(), lists);
        assert_eq!(abi::STEP_TABLE, ["lists", "items", "ops", "masks"]);
    }
}
