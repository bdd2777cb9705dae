//! The allocator of commands that live for milliseconds.
//!
//! One idea: such a process ends before it pays to reuse memory. The first [`ARENA_BYTES`] come from one piece of
//! the binary's own zeroed data, one block after the other; what is freed stays, unless it was the last block.
//! musl's allocator maps, touches and unmaps pages for nearly every size of block, and each mapping is copied into
//! the container's first process.
//!
//! Processes that live long (the monitor) close it first of all. Large blocks, and all that is asked for once it is
//! full or closed, come from the system's allocator.
//!
//! Invariant: bytes below `top` belong to exactly one block or to nobody; `top` moves only by atomic exchange, so
//! that threads may allocate too.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// More than a bundle's run asks for in all, with Docker's configuration.
pub const ARENA_BYTES: usize = 256 << 10;
/// Larger blocks are not for the arena: buffers of files, and vectors that grow.
const BLOCK_BYTES_MAX: usize = 16 << 10;
/// A `top` behind which nothing fits.
const CLOSED: usize = usize::MAX;

/// The allocator; one per process.
#[derive(Debug)]
pub struct Arena {
    bytes: UnsafeCell<Bytes>,
    /// Distance of the first free byte from the start.
    top: AtomicUsize,
}

#[derive(Debug)]
#[repr(C, align(4096))]
struct Bytes([u8; ARENA_BYTES]);

// SAFETY: blocks of `bytes` are given out by exchanging `top`, each to one caller; nothing else touches them.
unsafe impl Sync for Arena {}

impl Arena {
    /// An empty one.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "a constant of static memory")]
    pub const fn new() -> Self {
        Self { bytes: UnsafeCell::new(Bytes([0; ARENA_BYTES])), top: AtomicUsize::new(0) }
    }

    /// From now on everything new comes from the system's allocator. What was given out stays.
    pub fn close(&self) {
        self.top.store(CLOSED, Ordering::Relaxed);
    }

    fn start(&self) -> *mut u8 {
        self.bytes.get().cast()
    }

    /// Where in the arena a block is.
    fn offset(&self, block: *mut u8) -> Option<usize> {
        block.addr().checked_sub(self.start().addr()).filter(|offset| *offset < ARENA_BYTES)
    }

    fn take(&self, layout: Layout) -> Option<*mut u8> {
        let (size, align) = (layout.size(), layout.align());
        if size > BLOCK_BYTES_MAX || align > align_of::<Bytes>() {
            return None;
        }
        let mut top = self.top.load(Ordering::Relaxed);
        loop {
            let first = top.checked_next_multiple_of(align)?;
            let end = first.checked_add(size).filter(|end| *end <= ARENA_BYTES)?;
            match self.top.compare_exchange_weak(top, end, Ordering::AcqRel, Ordering::Relaxed) {
                // SAFETY: `first` lies within the arena, whose start is its provenance.
                Ok(_) => return Some(unsafe { self.start().add(first) }),
                Err(moved) => top = moved,
            }
        }
    }

    /// Moves the end of a block if it is the last one.
    fn move_end(&self, end: usize, to: usize) -> bool {
        to <= ARENA_BYTES && self.top.compare_exchange(end, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

// Never inlined: copied to every place that allocates they made the binary's code a tenth larger.
// SAFETY: a block is from the arena, aligned, large enough and nobody else's, or from the system's allocator, to
// which it goes back; which of both tells its address. Nothing unwinds.
unsafe impl GlobalAlloc for Arena {
    #[inline(never)]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match self.take(layout) {
            Some(block) => block,
            // SAFETY: the caller's promises are handed on.
            None => unsafe { System.alloc(layout) },
        }
    }

    #[inline(never)]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match self.take(layout) {
            // A block that was freed as the last one may be here once more.
            Some(block) => {
                // SAFETY: the block is `size` bytes long and ours.
                unsafe { block.write_bytes(0, layout.size()) };
                block
            }
            // SAFETY: the caller's promises are handed on.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    #[inline(never)]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match self.offset(block) {
            Some(offset) => {
                self.move_end(offset + layout.size(), offset);
            }
            // SAFETY: it is not the arena's, so that the system's allocator made it.
            None => unsafe { System.dealloc(block, layout) },
        }
    }

    #[inline(never)]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Some(offset) = self.offset(block) else {
            // SAFETY: it is not the arena's, so that the system's allocator made it.
            return unsafe { System.realloc(block, layout, size) };
        };
        if size <= BLOCK_BYTES_MAX && self.move_end(offset + layout.size(), offset + size) {
            return block;
        }
        if size <= layout.size() {
            return block;
        }
        // SAFETY: the alignment is that of a layout, and the caller promises that the size does not overflow.
        let larger = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: the size is not zero, as the caller promises.
        let moved = unsafe { self.alloc(larger) };
        if !moved.is_null() {
            // SAFETY: both are at least `layout.size()` bytes long, and different blocks.
            unsafe { moved.copy_from_nonoverlapping(block, layout.size()) };
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    fn arena() -> Box<Arena> {
        Box::new(Arena::new())
    }

    /// A block of `size` bytes, each written.
    fn filled(arena: &Arena, layout: Layout, byte: u8) -> *mut u8 {
        // SAFETY: the sizes of these tests are not zero.
        let block = unsafe { arena.alloc(layout) };
        // SAFETY: the block is that long.
        unsafe { block.write_bytes(byte, layout.size()) };
        block
    }

    fn holds(block: *mut u8, size: usize, byte: u8) -> bool {
        // SAFETY: the tests ask for blocks of theirs only.
        unsafe { std::slice::from_raw_parts(block, size) }.iter().all(|b| *b == byte)
    }

    #[test]
    fn blocks_are_aligned_and_apart() {
        let arena = arena();
        let (a, b) = (filled(&arena, layout(3, 1), 1), filled(&arena, layout(64, 64), 2));
        assert!(arena.offset(a).is_some() && arena.offset(b).is_some());
        assert_eq!(b.addr() % 64, 0);
        assert!(holds(a, 3, 1) && holds(b, 64, 2));
    }

    #[test]
    fn the_last_block_grows_in_place_and_is_given_back() {
        let arena = arena();
        let first = filled(&arena, layout(100, 8), 1);
        // SAFETY: the block is of that layout.
        let grown = unsafe { arena.realloc(first, layout(100, 8), 200) };
        assert_eq!(grown, first);
        let second = filled(&arena, layout(8, 8), 2);
        // SAFETY: the block is of that layout.
        let moved = unsafe { arena.realloc(grown, layout(200, 8), 400) };
        assert_ne!(moved, first);
        assert!(holds(moved, 100, 1) && holds(second, 8, 2));
        // SAFETY: the block is of that layout.
        unsafe { arena.dealloc(moved, layout(400, 8)) };
        // SAFETY: the size is not zero.
        let zeroed = unsafe { arena.alloc_zeroed(layout(300, 8)) };
        assert_eq!(zeroed, moved);
        assert!(holds(zeroed, 300, 0));
    }

    #[test]
    fn what_does_not_fit_comes_from_the_system() {
        let arena = arena();
        let mut inside = 0;
        loop {
            let block = filled(&arena, layout(BLOCK_BYTES_MAX, 16), 7);
            if arena.offset(block).is_none() {
                // SAFETY: the block is of that layout.
                unsafe { arena.dealloc(block, layout(BLOCK_BYTES_MAX, 16)) };
                break;
            }
            inside += 1;
        }
        assert_eq!(inside, ARENA_BYTES / BLOCK_BYTES_MAX);
        let large = filled(&arena, layout(BLOCK_BYTES_MAX + 1, 16), 7);
        assert!(arena.offset(large).is_none());
        // SAFETY: the block is of that layout.
        unsafe { arena.dealloc(large, layout(BLOCK_BYTES_MAX + 1, 16)) };
    }

    #[test]
    fn a_closed_one_gives_nothing_and_keeps_what_it_gave() {
        let arena = arena();
        let inside = filled(&arena, layout(8, 8), 1);
        arena.close();
        let outside = filled(&arena, layout(8, 8), 2);
        assert!(arena.offset(inside).is_some() && arena.offset(outside).is_none());
        // SAFETY: the block is of that layout.
        let moved = unsafe { arena.realloc(inside, layout(8, 8), 16) };
        assert!(arena.offset(moved).is_none() && holds(moved, 8, 1));
        for (block, size) in [(inside, 8), (outside, 8), (moved, 16)] {
            // SAFETY: the block is of that layout.
            unsafe { arena.dealloc(block, layout(size, 8)) };
        }
        assert!(arena.offset(filled(&arena, layout(8, 8), 3)).is_none());
    }

    #[test]
    fn threads_get_blocks_of_their_own() {
        let arena = arena();
        std::thread::scope(|scope| {
            for byte in 1..=4_u8 {
                let arena = &arena;
                scope.spawn(move || {
                    for size in 1..200 {
                        let block = filled(arena, layout(size, 8), byte);
                        assert!(holds(block, size, byte));
                        if size % 3 == 0 {
                            // SAFETY: the block is of that layout.
                            unsafe { arena.dealloc(block, layout(size, 8)) };
                        }
                    }
                });
            }
        });
    }
}
