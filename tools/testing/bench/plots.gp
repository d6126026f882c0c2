# SPDX-License-Identifier: GPL-2.0-only
#
# Plots of what scripts/bench measured: gnuplot -e "term='svg'" (or 'png'), in the
# directory with the .dat files that report.py wrote.

ext = term
if (term eq 'svg') { set terminal svg size 1000,720 background 'white' font 'sans,13' }
if (term eq 'png') { set terminal pngcairo size 1400,1000 font 'sans,13' }

set style line 1 lc rgb '#0072b2' lw 2 pt 5 ps 0.8
set style line 2 lc rgb '#d55e00' lw 2 pt 7 ps 0.8
set style line 3 lc rgb '#009e73' lw 3 pt 9 ps 0.9
set grid xtics ytics back lc rgb '#c0c0c0' lw 0.7 dt 1
set datafile missing '?'

# --- density: four panels ---
if (int(system("grep -c '^[0-9]' density.dat")) > 0) {
	set output 'density.' . ext
	set multiplot layout 2,2 title "Finding and re-arming dirty pages, slot of 1 GiB"
	set logscale xy
	set xlabel 'dirty pages, % of the slot'
	set ylabel 'instructions per dirty page'
	set xrange [0.0007:150]
	set yrange [30:100000]
	set format y '10^{%L}'
	set format x '%g'
	array panel = ['random, 1 vCPU', 'in order, 1 vCPU', 'random, 2 vCPUs', 'in order, 2 vCPUs']
	do for [i = 0:3] {
		set title panel[i + 1]
		plot 'density.dat' index i using 1:2 with linespoints ls 1 title 'bitmap', \
		     '' index i using 1:3 with linespoints ls 2 title 'upstream ring', \
		     '' index i using 1:4 with linespoints ls 3 title 'slot ring'
	}
	unset multiplot
	unset title
	reset
	set style line 1 lc rgb '#0072b2' lw 2 pt 5 ps 0.8
	set style line 2 lc rgb '#d55e00' lw 2 pt 7 ps 0.8
	set style line 3 lc rgb '#009e73' lw 3 pt 9 ps 0.9
	set grid xtics ytics back lc rgb '#c0c0c0' lw 0.7 dt 1
	set datafile missing '?'
}

# --- stall: what share of the writes took so long? ---
if (int(system("grep -c '^[0-9]' stall.dat")) > 0) {
	set output 'stall.' . ext
	set title 'A vCPU that writes beside a harvest of 20,000 pages'
	set logscale xy
	set xlabel 'microseconds (1,000 instructions) until the page is written'
	set ylabel 'share of the writes that took as long or longer'
	set format y '%g'
	set yrange [*:1.5]
	plot 'stall.dat' index 0 using 1:2 with linespoints ls 1 title 'bitmap', \
	     '' index 1 using 1:2 with linespoints ls 2 title 'upstream ring', \
	     '' index 2 using 1:2 with linespoints ls 3 title 'slot ring'
	set yrange [*:*]
}

# --- rings: three panels ---
if (int(system("grep -c '^[0-9]' rings.dat")) > 0) {
	set output 'rings.' . ext
	set multiplot layout 1,3 title 'Finding and re-arming dirty pages, by the size of the rings'
	unset logscale
	set logscale x 4
	set xlabel 'entries'
	set ylabel 'instructions per dirty page'
	set yrange [0:*]
	set format x '%.0f'
	set xtics rotate by -45
	set key bottom right
	set rmargin 5
	array work = ['64 MiB, all in order', '1 GiB, 1,000 random', '1 GiB, 20,000 random']
	do for [i = 0:2] {
		set title work[i + 1]
		plot 'rings.dat' index i using 1:2 with linespoints ls 2 title 'upstream ring', \
		     '' index i using 1:3 with linespoints ls 3 title 'slot ring'
	}
	unset multiplot
}
