//! Times the mounting of a root: `mount_layers <runs> <objects directory> <meta.erofs>…`, bottom first.

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;

use coracle_base::time::monotonic;
use coracle_sys::layered::LayeredRoot;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(runs), Some(objects)) = (args.next(), args.next()) else {
        return Err("usage: mount_layers <runs> <objects directory> <meta.erofs>...".into());
    };
    let runs: usize = runs.to_string_lossy().parse()?;
    let lowers: Vec<PathBuf> = args.map(PathBuf::from).collect();
    let n_layers = lowers.len();
    let root = LayeredRoot { lowers, objects: Some(objects.into()), ..LayeredRoot::default() };
    let (mut mounts, mut closes, mut unmounts) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let begin = monotonic();
        let mut leftovers = Vec::new();
        let mount = root.mount_leaving(&mut leftovers)?;
        mounts.push(begin.elapsed());
        let begin = monotonic();
        drop(leftovers);
        closes.push(begin.elapsed());
        let begin = monotonic();
        drop(mount);
        unmounts.push(begin.elapsed());
    }
    mounts.sort();
    closes.sort();
    unmounts.sort();
    let (Some(best), Some(worst)) = (mounts.first(), mounts.last()) else { return Err("no runs".into()) };
    let (middle, closed, unmounted) = (mounts[runs / 2], closes[runs / 2], unmounts[runs / 2]);
    writeln!(
        std::io::stdout(),
        "{n_layers} layers: best {best:?}, median {middle:?}, worst {worst:?}; medians of closing the leftovers \
         {closed:?}, of unmounting {unmounted:?}"
    )?;
    Ok(())
}
