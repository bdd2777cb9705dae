//! Cuts a file system off from its disk as a power failure does, to test what survives one.
//!
//! Source: Linux `fs/ext4/ioctl.c` (`EXT4_IOC_SHUTDOWN`), `fs/xfs/xfs_fsops.c` (`XFS_IOC_GOINGDOWN`): one number.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

const SHUTDOWN: Opcode = opcode::read::<u32>(b'X', 125);
/// The journal's buffers are dropped, too.
const NO_LOG_FLUSH: u32 = 2;

/// Stops all writing to the file system that `mount_point` is the root of, at once and for good: what has not
/// reached the disk is lost. Needs root; ext4, xfs and f2fs can do it.
///
/// # Errors
/// The kernel's: not permitted, or not supported by the file system.
pub fn cut(mount_point: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the opcode takes a pointer to one u32, which is what this setter passes.
    let order = unsafe { Setter::<SHUTDOWN, u32>::new(NO_LOG_FLUSH) };
    // SAFETY: the setter holds its own value for the length of the call; the kernel only reads it.
    unsafe { ioctl(mount_point, order) }?;
    Ok(())
}
