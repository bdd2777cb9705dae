//! Memory that is given back to the kernel.
//!
//! A process that parses a large specification once and then waits for hours keeps the stack pages it used for
//! that. They are the largest part of a monitor's private memory: 100 of 150 kB.
//!
//! Source: madvise(2), measured with `smaps_rollup`.

use std::io;

/// Distance to the caller's own frames that is left alone: theirs lie above, and a signal's or a callee's below
/// are made anew.
const MARGIN_BYTES: usize = 4 << 10;

/// How far down pages are looked for. Below the main thread's stack nothing is mapped for a megabyte at least
/// (the kernel's guard gap), so that the range touches nothing else.
const REACH_BYTES: usize = 512 << 10;

/// Gives back the pages of the stack that deeper calls have used and left. They read as zeros when they are used
/// again. Does nothing in a process with several threads, where the stack may be any thread's.
///
/// # Errors
/// `/proc` is not there, or the kernel refused.
pub fn release_stack() -> io::Result<()> {
    if !crate::process::is_single_threaded()? {
        return Ok(());
    }
    let here = 0_u8;
    // SAFETY: asks for a constant of the system.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(REACH_BYTES);
    let top = ((&raw const here).addr() - MARGIN_BYTES) & !(page - 1);
    let bottom = std::ptr::without_provenance_mut(top - REACH_BYTES);
    // SAFETY: the only thread runs on the main stack, which grows downwards; the range lies below every live
    // frame of it, and what is not mapped there is passed over. No reference points into dead frames.
    let released = unsafe { libc::madvise(bottom, REACH_BYTES, libc::MADV_DONTNEED) };
    let error = io::Error::last_os_error();
    // ENOMEM says that a part was not mapped; the rest is done.
    if released == 0 || error.raw_os_error() == Some(libc::ENOMEM) { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the tests run as threads or not, it does no harm; the monitor's tests measure what it does.
    #[test]
    fn live_frames_keep_what_they_hold() {
        let held = [0xA5_u8; 8 << 10];
        release_stack().unwrap();
        assert!(std::hint::black_box(&held).iter().all(|&b| b == 0xA5));
    }
}
